import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.data import inspection
from dpjax.data.arrays import ArraySource
from dpjax.data.inspection import inspect

ROWS = np.arange(5000, dtype=np.float32).reshape(2500, 2)


def source(**columns):
    return ArraySource({"x": ROWS.copy(), **columns})


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 1024, 2499])
def test_a_value_that_is_not_finite_is_refused_and_not_told(where, value, dtype):
    extra = np.zeros((2500, 3)).astype(dtype)
    inspect(source(extra=extra), limits={})
    extra[where, 1] = value
    with pytest.raises(ValueError, match="'extra' is NaN or infinite") as error:
        inspect(source(extra=extra), limits={})
    assert not any(digit in str(error.value) for digit in "0123456789")


@pytest.mark.parametrize("value", [-1, 3])
@pytest.mark.parametrize("where", [0, 1023, 1024, 2499])
def test_a_label_outside_is_refused_and_not_told(where, value):
    labels = np.arange(2500, dtype=np.int32) % 3
    inspect(source(label=labels), limits={"label": 3})
    labels[where] = value
    with pytest.raises(ValueError, match=r"'label' is outside \[0, 3\)") as error:
        inspect(source(label=labels), limits={"label": 3})
    told = str(error.value).replace("[0, 3)", "").replace("num_classes=3", "")
    assert not any(digit in told for digit in "0123456789")


@pytest.mark.parametrize("value", [-1, 7])
def test_a_token_outside_is_refused(value):
    tokens = np.arange(5000, dtype=np.int32).reshape(2500, 2) % 7
    inspect(source(tokens=tokens), limits={"tokens": 7})
    tokens[2, 1] = value
    with pytest.raises(ValueError, match="use the tokenizer of the model, or another"):
        inspect(source(tokens=tokens), limits={"tokens": 7})


@pytest.mark.parametrize("labels", [np.zeros(2500), np.zeros((2500, 3), np.int32)])
def test_a_label_is_a_scalar_integer(labels):
    with pytest.raises(ValueError, match="label must be a scalar integer"):
        inspect(source(label=labels), limits={"label": 3})


def test_copies_are_counted_wherever_they_are():
    found = inspect(source(), limits={})
    assert (found.duplicates, found.copies) == (0, 1)
    rows = ROWS.copy()
    rows[[7, 1500, 2499]] = rows[3]
    rows[11] = rows[12]
    found = inspect(ArraySource({"x": rows}), limits={})
    assert (found.duplicates, found.copies) == (4, 4)
    # They are copies only if they agree in all fields.
    found = inspect(ArraySource({"x": rows, "id": np.arange(2500)}), limits={})
    assert (found.duplicates, found.copies) == (0, 1)
    assert "4" not in repr(found)


def test_of_very_many_records_evenly_spaced_pieces_are_read(monkeypatch):
    monkeypatch.setattr(inspection, "MOST", 3000)
    rows = np.arange(10_000, dtype=np.float32)
    asked = []

    class Spy(ArraySource):
        def __getitem__(self, indices):
            asked.extend(indices)
            return super().__getitem__(indices)

    found = inspect(Spy({"x": rows}), limits={})
    assert found == (0, 1, 3072, False)
    assert len(asked) == len(set(asked)) == 3072
    for part in range(0, 9_000, 3_000):  # in order, and none is far from the others
        assert any(part <= index < part + 3_000 for index in asked)
    assert inspect(Spy({"x": rows[:3000]}), limits={}).whole
