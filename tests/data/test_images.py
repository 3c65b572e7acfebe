import os
import shutil

import numpy as np
import pytest
from PIL import Image

from dpjax.data.images import image_folder


@pytest.fixture
def root(image_root, tmp_path):
    """A copy of the images that a test may damage."""
    return shutil.copytree(image_root, tmp_path / "images")


def read(root, *, split="train", cache=None):
    return image_folder(path=str(root), split=split, cache=cache)


def test_labels_are_alphabetical_and_pixels_those_of_the_files(image_root):
    records = read(image_root)[list(range(15))]
    assert records["label"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    with Image.open(image_root / "train" / "cat" / "3.png") as image:
        expected = np.asarray(image) / np.float32(255)
    np.testing.assert_array_equal(records["image"][5 + 3], expected)


def test_a_class_missing_from_a_split_shifts_no_label(root):
    shutil.rmtree(root / "test" / "cat")
    labels = read(root, split="test").arrays["label"]
    assert np.unique(labels).tolist() == [0, 2]


def test_gray_images_suffixes_and_other_files(tmp_path):
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    for name in ("0.PNG", "1.jpg", "2.jpeg"):
        Image.fromarray(np.full((6, 4), 7, np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    source = read(tmp_path)
    assert source.arrays["image"].shape == (3, 6, 4, 1)
    assert np.unique(source.arrays["image"]).tolist() == [7]


def test_bad_files_are_counted_and_named(root):
    whole = (root / "train" / "bird" / "0.png").read_bytes()
    bad = [root / "train" / "cat" / f"{i}.png" for i in range(5)]
    bad += [root / "train" / "dog" / "0.png"]
    bad[0].write_bytes(b"not an image")
    bad[1].write_bytes(whole[: len(whole) // 2])
    bad[2].write_bytes(b"")
    Image.new("RGB", (4, 5)).save(bad[3])
    Image.new("RGBA", (4, 6)).save(bad[4])
    Image.new("L", (4, 6)).save(bad[5])
    with pytest.raises(ValueError, match=r"^6 of 15 images are unusable") as error:
        read(root)
    message = str(error.value)
    assert "\n" not in message
    reasons = ["cannot be decoded"] * 3 + [r"has shape (5, 4, 3)", "has mode RGBA"]
    for path, reason in zip(bad[:5], reasons, strict=True):
        assert f"{path} {reason}" in message
    assert str(bad[5]) not in message  # the sixth


def test_the_first_file_may_be_the_bad_one(root):
    bad = root / "train" / "bird" / "0.png"
    bad.write_bytes(b"")
    with pytest.raises(ValueError, match=f"^1 of 15 images are unusable: {bad}"):
        read(root)


def test_empty_folders(root):
    with pytest.raises(FileNotFoundError, match="valid has no class folders"):
        read(root, split="valid")
    (root / "train" / "ant").mkdir()
    with pytest.raises(ValueError, match="ant has no"):
        read(root)


def change_pixels(file):
    pixels = file.with_name("1.png").read_bytes()
    assert len(pixels) == file.stat().st_size
    file.write_bytes(pixels)  # only the time of modification tells


def change_size(file):
    Image.new("RGB", (4, 6)).save(file)
    os.utime(file, (0, 0))


def change_order(file):
    file.rename(file.with_name("9.png"))


@pytest.mark.parametrize("change", [change_pixels, change_size, change_order])
def test_cache_is_used_until_a_file_changes(change, root, tmp_path, monkeypatch):
    for file in root.rglob("*.png"):
        os.utime(file, (0, 0))
    cache = str(tmp_path / "cache")
    first = read(root, cache=cache).arrays["image"]
    with monkeypatch.context() as patch:
        patch.setattr("dpjax.data.images.decode_image", None)  # would fail if called
        again = read(root, cache=cache).arrays["image"]
    np.testing.assert_array_equal(first, again)

    change(root / "train" / "bird" / "0.png")
    changed = read(root, cache=cache).arrays["image"]
    assert not np.array_equal(changed, first)
    np.testing.assert_array_equal(changed, read(root).arrays["image"])


def test_cache_is_not_written_for_unusable_images(root, tmp_path):
    (root / "train" / "bird" / "0.png").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ValueError, match="unusable"):
            read(root, cache=str(tmp_path / "cache"))


def test_a_crash_while_caching_leaves_no_half_file(root, tmp_path, monkeypatch):
    def crash(path, array):
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", crash)
        with pytest.raises(KeyboardInterrupt):
            read(root, cache=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(read(root, cache=str(tmp_path / "cache"))) == 15
