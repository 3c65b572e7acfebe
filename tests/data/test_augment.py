import jax
import numpy as np
import pytest

from dpjax.data.augment import flip_and_crop


def draw_views(image, *, padding, count):
    augment = flip_and_crop(padding=padding)
    keys = jax.random.split(jax.random.key(0), count)
    example = {"image": image, "label": np.int32(7)}
    return jax.jit(jax.vmap(augment, (0, None)))(keys, example)


def test_views_are_exactly_the_flipped_and_plain_crops():
    image = np.arange(4 * 5 * 2, dtype=np.float32).reshape(4, 5, 2)
    padding = 2
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    expected = set()
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[top : top + 4, left : left + 5]
            expected |= {crop.tobytes(), crop[:, ::-1].tobytes()}
    views = np.asarray(draw_views(image, padding=padding, count=1000)["image"])
    assert {view.tobytes() for view in views} == expected


def test_half_of_the_views_are_flipped():
    image = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    views = np.asarray(draw_views(image, padding=0, count=1000)["image"])
    flipped = np.mean([np.array_equal(view, image[:, ::-1]) for view in views])
    plain = np.mean([np.array_equal(view, image) for view in views])
    assert flipped + plain == 1.0
    # Six standard deviations.
    assert abs(flipped - 0.5) < 0.095


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_only_the_image_changes_and_keeps_its_shape_and_dtype(dtype):
    views = draw_views(np.zeros((6, 5, 3), dtype), padding=1, count=4)
    assert views["image"].shape == (4, 6, 5, 3)
    assert views["image"].dtype == dtype
    np.testing.assert_array_equal(views["label"], np.full(4, 7))


def test_negative_padding_raises():
    with pytest.raises(
        ValueError, match="padding=-1 must be an integer, and must not be negative"
    ):
        flip_and_crop(padding=-1)
