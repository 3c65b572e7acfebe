"""The contract of ``Source``: one body for every implementation."""

import numpy as np
import pytest

from dpjax.data.array_record import array_records
from dpjax.data.arrays import ArraySource, digits, npz
from dpjax.data.images import image_folder
from dpjax.data.text import labelled_texts, text_blocks, text_lines, text_pairs
from dpjax.data.tfds import tfds_source
from dpjax.data.tokenizers import byte_level
from tests.data.test_array_record import write_shard

PIXELS = np.random.default_rng(0).integers(256, size=(20, 5, 4, 3), dtype=np.uint8)
LABELS = np.arange(20) % 3


def build_npz(tmp_path):
    arrays = {f"x_{s}": PIXELS for s in ("train", "test")}
    arrays |= {f"y_{s}": LABELS for s in ("train", "test")}
    np.savez(tmp_path / "set.npz", **arrays)
    return npz(path=str(tmp_path / "set.npz"), split="train")


def build_text(tmp_path):
    (tmp_path / "lines.txt").write_text("one\ntwo\nthree\nfour\nfive\nsix\nseven\n")
    path, tokenizer = str(tmp_path / "lines.txt"), byte_level(specials=())
    return text_lines(path=path, length=4, tokenizer=tokenizer)


def build_blocks(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    path, tokenizer = str(tmp_path / "text.txt"), byte_level(specials=())
    return text_blocks(path=path, length=4, tokenizer=tokenizer, start=0.0, stop=1.0)


def build_table(build, tmp_path, **options):
    (tmp_path / "table.csv").write_text(
        "a,b\n" + "".join(f"{i * 'x'},{i}\n" for i in range(9))
    )
    return build(
        path=str(tmp_path / "table.csv"), delimiter=",", columns=(), length=6,
        template=("{a}", "<eos>"), tokenizer=byte_level(specials=("<eos>",)), **options,
    )  # fmt: skip


def build_folder(request, *, cache):
    root = request.getfixturevalue("image_root")
    return image_folder(path=str(root), split="train", cache=cache)


def build_tfds(request, *, in_memory):
    return tfds_source(
        name="image_archive/tiny:1.0.0",
        data_dir=str(request.getfixturevalue("tfds_dir")),
        split="train",
        features=("image", "label"),
        in_memory=in_memory,
    )


def build_records(tmp_path):
    for name, rows in {"a": range(4), "b": range(4, 20)}.items():
        records = [PIXELS[i].tobytes() + LABELS[i].tobytes() for i in rows]
        write_shard(tmp_path / f"{name}.array_record", records)
    features = (("image", "uint8[5, 4, 3]"), ("label", "int64[]"))
    return array_records(path=str(tmp_path), features=features, pixels=("image",))


TOKENS = {"tokens": ("int32", 1), "mask": ("bool", 1)}
IMAGE = {"image": ("float32", 3), "label": ("int32", 0)}
SOURCES = {  # name -> (build(request, tmp_path), length, {key: (dtype, ndim)})
    "arrays": (
        lambda request, tmp_path: ArraySource({"x": LABELS, "y": PIXELS / 2}),
        20,
        {"x": ("int64", 0), "y": ("float64", 3)},
    ),
    "pixels": (
        lambda request, tmp_path: ArraySource({"image": PIXELS}, pixels=("image",)),
        20,
        {"image": ("float32", 3)},
    ),
    "digits": (
        lambda request, tmp_path: digits(split="test", test_fraction=0.2),
        360,
        IMAGE,
    ),
    "npz": (lambda request, tmp_path: build_npz(tmp_path), 20, IMAGE),
    "image_folder": (
        lambda request, tmp_path: build_folder(request, cache=None),
        15,
        IMAGE,
    ),
    "image_folder_cached": (
        lambda request, tmp_path: build_folder(request, cache=str(tmp_path)),
        15,
        IMAGE,
    ),
    "tfds": (lambda request, tmp_path: build_tfds(request, in_memory=False), 15, IMAGE),
    "tfds_in_memory": (
        lambda request, tmp_path: build_tfds(request, in_memory=True),
        15,
        IMAGE,
    ),
    "array_records": (
        lambda request, tmp_path: build_records(tmp_path),
        20,
        IMAGE | {"label": ("int64", 0)},
    ),
    "text": (
        lambda request, tmp_path: build_text(tmp_path),
        7,
        TOKENS,
    ),
    "blocks": (lambda request, tmp_path: build_blocks(tmp_path), 7, TOKENS),
    "labelled_texts": (
        lambda request, tmp_path: build_table(labelled_texts, tmp_path, label="b"),
        9,
        TOKENS | {"label": ("int32", 0)},
    ),
    "text_pairs": (
        lambda request, tmp_path: build_table(text_pairs, tmp_path, target=1),
        9,
        TOKENS | {"weights": ("float32", 1)},
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_source_contract(name, request, tmp_path):
    build, length, expected = SOURCES[name]
    source = build(request, tmp_path)
    assert len(source) == length

    every = source[list(range(length))]
    assert every.keys() == expected.keys()
    for key, (dtype, ndim) in expected.items():
        array = every[key]
        assert isinstance(array, np.ndarray)
        assert array.dtype == dtype
        assert array.ndim == ndim + 1
        assert len(np.unique(array, axis=0)) > 1  # or the order could not be seen
        for indices in ([0], [length - 1], [3, 1, 3, 3], [5, 4], []):
            np.testing.assert_array_equal(source[indices][key], array[indices])
        if key == "image":
            assert array.min() >= 0
            assert 0.9 < array.max() <= 1

    for index in (-1, length, length + 5):
        with pytest.raises(IndexError, match=rf"an index is outside .*{length}"):
            source[[0, index]]
    for not_a_list_of_ints in (0, [0.5], [True, False]):
        with pytest.raises(TypeError, match="list of ints"):
            source[not_a_list_of_ints]
