"""What is special about shards of array_record files; the contract is in test_sources."""

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from ml_collections import ConfigDict

import dpjax
from dpjax.data.array_record import array_records
from dpjax.data.batches import check_records
from dpjax.mechanisms import NonPrivate
from dpjax.privacy.sampling import Poisson
from dpjax.training import config as configs

TOKENS = np.arange(35, dtype="<i4").reshape(7, 5)


def write_shard(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


@pytest.fixture
def folder(tmp_path):
    """Two shards of the tokens, written in the other order."""
    write_shard(tmp_path / "b-1.array_record", [row.tobytes() for row in TOKENS[3:]])
    write_shard(tmp_path / "b-0.array_record", [row.tobytes() for row in TOKENS[:3]])
    return tmp_path


def opened(folder, *, features=None, pixels=()):
    features = (("tokens", "int32[5]"),) if features is None else features
    return array_records(path=str(folder), features=features, pixels=pixels)


def test_records_are_numbered_through_the_shards_in_the_order_of_their_names(folder):
    source = opened(folder)
    check_records(source)
    np.testing.assert_array_equal(source[[5, 0, 3, 5]]["tokens"], TOKENS[[5, 0, 3, 5]])
    assert source[[0]]["tokens"].dtype == np.dtype(np.int32)


def test_features_lie_one_after_another(folder):
    source = opened(folder, features=(("prefix", "int32[2]"), ("a", "uint8[3,4]")))
    found = source[[6, 1]]
    np.testing.assert_array_equal(found["prefix"], TOKENS[[6, 1], :2])
    rest = TOKENS[[6, 1], 2:].copy().view(np.uint8).reshape(2, 3, 4)
    np.testing.assert_array_equal(found["a"], rest)


def test_a_config_keeps_the_order_of_the_features(folder):
    features = (("z", "int32[2]"), ("a", "int32[3]"))
    spec = ConfigDict(
        {
            "name": "dpjax.data.array_record:array_records",
            "path": str(folder),
            "features": features,
            "pixels": (),
        }
    )
    found = configs.build(spec.to_dict())[[4]]
    np.testing.assert_array_equal(found["z"], TOKENS[[4], :2])
    np.testing.assert_array_equal(found["a"], TOKENS[[4], 2:])


def test_each_shard_is_read_forward_and_a_record_once(folder, monkeypatch):
    source, asked = opened(folder), []
    get = source.records.__getitems__
    monkeypatch.setattr(
        type(source.records),
        "__getitems__",
        lambda self, keys: asked.append(list(keys)) or get(keys),
    )
    source[[6, 2, 2, 4, 0]]
    assert asked == [[0, 2, 4, 6]]


def test_batches_hold_what_was_drawn(folder):
    source = opened(folder)
    mechanism = NonPrivate(
        sampling=Poisson(rate=0.5), steps=6, num_examples=7, delta=0.1
    )
    stream = dpjax.batches(source, mechanism, seed=3, physical_batch_size=2)
    for batch in stream:
        for chunk in batch.chunks:
            np.testing.assert_array_equal(
                chunk.examples["tokens"], TOKENS[np.asarray(chunk.index)]
            )


def test_a_record_of_another_size_is_refused_and_not_told(folder):
    write_shard(folder / "c.array_record", [bytes(20), bytes(17), bytes(20)])
    source = opened(folder)
    source[[7, 9]]
    with pytest.raises(ValueError, match="a record is not of the 20 bytes") as error:
        source[[0, 8]]
    assert "17" not in str(error.value).replace(str(folder), "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": ()}, r"features=\(\) must be pairs of different keys"),
        ({"features": {"tokens": "int32[5]"}}, "must be pairs of different keys"),
        ({"features": ("tokens", "int32[5]")}, "must be pairs of different keys"),
        ({"features": (("a", "int32[2]"), ("a", "int32[3]"))}, "must be pairs of diff"),
        ({"features": (("tokens", "int32"),)}, r"features\['tokens'\]='int32' must be"),
        (
            {"features": (("tokens", "token[5]"),)},
            "must be a numeric dtype and a shape",
        ),
        ({"features": (("tokens", "str[5]"),)}, "must be a numeric dtype and a shape"),
        ({"features": (("tokens", "int32[5, 0]"),)}, "has no values"),
        (
            {"features": (("tokens", "int32[-1]"),)},
            "must be a numeric dtype and a shape",
        ),
        ({"features": (("tokens", "int32[6]"),)}, "a record is not of the 24 bytes"),
        ({"pixels": ("tokens",)}, "pixels='tokens' is not a uint8 feature"),
    ],
)
def test_malformed_features_are_refused(folder, change, message):
    with pytest.raises(ValueError, match=message) as error:
        opened(folder, **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"no array_record" * 10_000])
def test_a_shard_without_records_is_refused_by_its_name(folder, content):
    path = folder / "b-2.array_record"
    write_shard(path, []) if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=r"b-2.array_record has no records"):
        opened(folder)


def test_a_folder_without_shards_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"has no files \*.array_record"):
            opened(folder)
