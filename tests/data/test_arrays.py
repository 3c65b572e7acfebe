import subprocess
import sys

import numpy as np
import pytest

from dpjax.data.arrays import ArraySource, diabetes, digits, few_shots, friedman, npz


@pytest.mark.parametrize(
    "arrays", [{}, {"x": np.ones(0)}, {"x": np.ones(3), "y": np.ones((4, 3))}]
)
def test_array_source_needs_one_positive_length(arrays):
    with pytest.raises(ValueError, match="equal length") as error:
        ArraySource(arrays)
    assert str({key: len(array) for key, array in arrays.items()}) in str(error.value)


@pytest.mark.parametrize("key", ["x", "z"])
def test_pixels_must_be_uint8(key):
    with pytest.raises(ValueError, match=f"pixels='{key}'"):
        ArraySource({"x": np.ones(3)}, pixels=(key,))


def test_pixels_are_scaled_exactly_and_stay_small_in_memory():
    source = ArraySource({"x": np.arange(256, dtype=np.uint8)}, pixels=("x",))
    assert source.arrays["x"].dtype == np.uint8
    values = source[list(range(256))]["x"]
    assert values[0] == 0
    assert values[255] == 1
    np.testing.assert_allclose(values * 255, np.arange(256), rtol=1e-6)


def test_digits_split_is_a_fixed_stratified_partition():
    train = digits(split="train", test_fraction=0.25)
    test = digits(split="test", test_fraction=0.25)
    assert (len(train), len(test)) == (1347, 450)
    # Recorded once: a resumed or repeated run must see the same split.
    assert train.arrays["label"][:8].tolist() == [7, 3, 6, 6, 7, 6, 7, 9]
    both = np.concatenate([train.arrays["image"], test.arrays["image"]])
    assert len(np.unique(both, axis=0)) == 1797  # disjoint: no image occurs twice
    counts = np.bincount(test.arrays["label"])
    assert counts.min() >= 43
    assert counts.max() <= 46


def test_diabetes_is_a_fixed_partition_in_a_known_range():
    parts = [diabetes(split=split, test_fraction=0.2) for split in ("train", "test")]
    assert [len(part) for part in parts] == [353, 89]
    x, y = (np.concatenate([p.arrays[key] for p in parts]) for key in ("x", "y"))
    assert len(np.unique(x, axis=0)) == 442
    assert (y.min(), y.max()) == (-1, 1)
    np.testing.assert_allclose(x.std(axis=0), 1, rtol=1e-5)
    # Recorded once: a resumed or repeated run must see the same split.
    np.testing.assert_allclose(
        parts[0].arrays["y"][:2], [-0.626168, -0.302181], rtol=1e-5
    )


def test_friedman_is_its_formula():
    kwargs = {"test_fraction": 0.25, "num_examples": 400, "seed": 3}
    train, test = (
        friedman(split=split, noise=0.0, **kwargs) for split in ("train", "test")
    )
    assert (len(train), len(test)) == (300, 100)
    x = train.arrays["x"] / np.sqrt(12) + 0.5
    target = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
    target += 10 * x[:, 3] + 5 * x[:, 4]
    np.testing.assert_allclose(train.arrays["y"], (target - 14.4) / 5, atol=1e-5)
    assert train[[0]]["x"].dtype == train[[0]]["y"].dtype == np.float32
    noisy = friedman(split="train", noise=5.0, **kwargs).arrays["y"]
    assert 0.9 < np.std(noisy - train.arrays["y"]) < 1.1
    assert not set(map(bytes, train.arrays["x"])) & set(map(bytes, test.arrays["x"]))


@pytest.mark.parametrize("source", [digits, diabetes])
def test_splits_are_checked(source):
    with pytest.raises(ValueError, match="split='validation'"):
        source(split="validation", test_fraction=0.2)
    with pytest.raises(ValueError, match=r"test_fraction=1\.0"):
        source(split="train", test_fraction=1.0)


def test_digits_refuses_bad_arguments():
    with pytest.raises(ValueError, match="split='validation'"):
        digits(split="validation", test_fraction=0.2)
    for fraction in (0.0, 1.0, 5):
        with pytest.raises(ValueError, match=f"test_fraction={fraction}"):
            digits(split="train", test_fraction=fraction)


def keras_arrays(**changes):
    images = np.arange(4 * 3 * 2, dtype=np.uint8).reshape(4, 3, 2)
    arrays = {"x_train": images, "y_train": np.array([1, 0, 2, 1], np.uint8)}
    arrays |= {"x_test": images[:2], "y_test": np.array([2, 0], np.uint8)}
    return arrays | changes


def test_npz_reads_each_split_and_adds_the_channel(tmp_path):
    path = str(tmp_path / "set.npz")
    np.savez(path, **keras_arrays())
    train, test = npz(path=path, split="train"), npz(path=path, split="test")
    assert (len(train), len(test)) == (4, 2)
    records = train[[3, 0]]
    expected = keras_arrays()["x_train"][[3, 0], ..., None] / 255
    np.testing.assert_allclose(records["image"], expected, rtol=1e-6)
    assert records["label"].tolist() == [1, 1]
    assert test[[0]]["label"].tolist() == [2]
    assert train.arrays["image"].dtype == np.uint8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.ones((4, 3, 2))}, "x_train must be uint8"),
        ({"x_train": np.ones((4, 3), np.uint8)}, r"x_train must be uint8 .*\[4, 3\]"),
        ({"y_train": np.ones(3, np.uint8)}, r"y_train must be integers \[4\]"),
        ({"y_train": np.ones(4)}, "y_train must be integers .*float64"),
    ],
)
def test_npz_refuses_another_layout(changes, message, tmp_path):
    path = str(tmp_path / "set.npz")
    np.savez(path, **keras_arrays(**changes))
    with pytest.raises(ValueError, match=message):
        npz(path=path, split="train")


def test_npz_names_what_is_missing(tmp_path):
    path = str(tmp_path / "set.npz")
    with pytest.raises(FileNotFoundError, match=path):
        npz(path=path, split="train")
    arrays = keras_arrays()
    del arrays["y_train"]
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=rf"{path}.*\['y_train'\]"):
        npz(path=path, split="train")
    with pytest.raises(ValueError, match="split='valid'"):
        npz(path=path, split="valid")


def test_importing_the_sources_imports_nothing_heavy():
    modules = "dpjax.data.arrays, dpjax.data.images, dpjax.data.text, dpjax.data.tfds"
    heavy = {"sklearn", "PIL", "tensorflow_datasets", "grain", "jax"}
    code = f"import sys, {modules}; print({heavy!r} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "set()"


def test_few_shots_are_the_first_of_each_class():
    labels = np.array([2, 0, 0, 2, 1, 1, 2, 0], np.int32)
    source = ArraySource({"x": np.arange(8), "label": labels})
    chosen = few_shots(source=source, per_class=2)
    np.testing.assert_array_equal(chosen.arrays["x"], [0, 1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="a class has fewer examples than per_class=3"):
        few_shots(source=source, per_class=3)
    with pytest.raises(
        ValueError, match="per_class=0 must be an integer of at least 1"
    ):
        few_shots(source=source, per_class=0)
