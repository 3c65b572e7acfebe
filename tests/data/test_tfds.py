import json
import shutil
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from dpjax.data.builders import image_archive
from dpjax.data.images import image_folder
from dpjax.data.tfds import tfds_source


def read(
    data_dir,
    *,
    name="image_archive/tiny:1.0.0",
    split="train",
    features=("image", "label"),
    in_memory=False,
):
    return tfds_source(
        name=name,
        data_dir=str(data_dir),
        split=split,
        features=features,
        in_memory=in_memory,
    )


def prepare(archive, data_dir):
    arguments = {"archive": archive, "name": "tiny", "data_dir": data_dir}
    image_archive.main([f"--{key}={value}" for key, value in arguments.items()])


@pytest.mark.parametrize("split", ["train", "test"])
def test_round_trip_equals_the_image_folder(split, image_root, tfds_dir):
    folder = image_folder(path=str(image_root), split=split, cache=None)
    source = read(tfds_dir, split=split)

    def ordered(records):  # TFDS shuffles once, when it prepares
        flat = records["image"].reshape(15, -1)
        order = np.lexsort(flat.T)
        return flat[order], records["label"][order]

    for ours, theirs in zip(
        ordered(source[list(range(15))]), ordered(folder[list(range(15))]), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert "tensorflow" not in sys.modules


def test_sub_splits_and_single_features(tfds_dir):
    source = read(tfds_dir, split="train[5:9]", features=("label",))
    whole = read(tfds_dir)
    assert len(source) == 4
    records = source[[3, 0]]
    assert records.keys() == {"label"}
    assert records["label"].tolist() == whole[[8, 5]]["label"].tolist()


def test_in_memory_keeps_pixels_small_and_reads_the_same(tfds_dir):
    streamed, held = read(tfds_dir), read(tfds_dir, in_memory=True)
    assert held.arrays["image"].dtype == np.uint8
    for key, values in streamed[[4, 0, 4]].items():
        np.testing.assert_array_equal(held[[4, 0, 4]][key], values)


def test_not_prepared(tfds_dir, tmp_path):
    message = "not prepared.*version.*array_record"
    with pytest.raises(FileNotFoundError, match=message):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        read(tfds_dir, name="image_archive/tiny")  # without its version


def test_unknown_split_or_features(tfds_dir):
    with pytest.raises(ValueError, match="Unknown split 'valid'"):
        read(tfds_dir, split="valid")
    for features in ((), ("label", "bounding_box")):
        with pytest.raises(ValueError, match=r"features=.*\['image', 'label'\]"):
            read(tfds_dir, features=features)


def edited(tfds_dir, tmp_path, file, edit):
    """Copy the prepared data set, with one of its JSON files edited."""
    copy = shutil.copytree(tfds_dir / "image_archive", tmp_path / "image_archive")
    path = copy / "tiny" / "1.0.0" / file
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return tmp_path


def test_formats_without_random_access_are_refused(tfds_dir, tmp_path):
    def edit(info):
        info["fileFormat"] = "tfrecord"

    data_dir = edited(tfds_dir, tmp_path, "dataset_info.json", edit)
    with pytest.raises(ValueError, match="prepared as tfrecord"):
        read(data_dir)


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (lambda t: t.features.Image(shape=(None, None, 3)), "no fixed shape"),
        (lambda t: t.features.Text(), "not numeric"),
        (lambda t: t.features.Sequence({"a": t.features.Text()}), "no fixed shape"),
    ],
)
def test_features_must_be_numeric_of_fixed_shape(feature, message, tfds_dir, tmp_path):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({"image": feature(tfds)})

    def edit(content):
        content.clear()
        content.update(features.to_json())

    data_dir = edited(tfds_dir, tmp_path, "features.json", edit)
    with pytest.raises(ValueError, match=f"'image'.*{message}"):
        read(data_dir, features=("image",))


@pytest.mark.parametrize(
    ("size", "name", "message"),
    [
        ((3, 3), "train/cat/9.png", r"cat/9.png has shape \(3, 3, 3\)"),
        (None, "train/cat/9.png", "cat/9.png cannot be decoded"),
        ((4, 6), "9.png", "9.png is not <split>/<class>/<name>"),
    ],
)
def test_builder_refuses_bad_images(size, name, message, image_root, tmp_path):
    bad = tmp_path / "bad.png"
    bad.touch()
    if size:
        Image.new("RGB", size).save(bad)
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        archive.add(image_root, arcname=".")
        archive.add(bad, arcname=name)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "bad.tar", tmp_path)


def test_builder_refuses_to_keep_older_data(image_root, tfds_dir):
    with pytest.raises(FileExistsError, match="remove it or change --name"):
        prepare(tfds_dir / "tiny.tar.gz", tfds_dir)


def test_builder_refuses_an_archive_without_images(tmp_path):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(ValueError, match=r"empty\.tar has no"):
        prepare(tmp_path / "empty.tar", tmp_path)
