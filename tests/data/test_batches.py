import threading
import time
import tracemalloc

import numpy as np
import pytest

import dpjax
from dpjax.data import batches as data_batches
from dpjax.data.arrays import ArraySource
from dpjax.data.batches import (
    batches,
    check_records,
    fingerprint,
    overlap,
    read_steps,
)
from dpjax.mechanisms import NonPrivate
from dpjax.privacy.sampling import FullBatch

N = 40
SOURCE = ArraySource(
    {
        "x": np.random.default_rng(0).normal(size=(N, 3, 2)).astype(np.float32),
        "label": np.arange(1, N + 1, dtype=np.int32),
        "flag": np.ones(N, bool),
    }
)
SIZES = (0, 1, 3, 4, 5, 8, 13, 0, 40)  # of the draws of steps 0, 1, ...
STEPS = range(len(SIZES))


def draw(step):
    return np.random.default_rng(step).permutation(N)[: SIZES[step]]


def read(steps=STEPS, *, source=SOURCE, draw=draw, size=4, rows=None, prefetch=2):
    return read_steps(
        source,
        draw,
        steps=steps,
        physical_batch_size=size,
        rows=rows,
        prefetch=prefetch,
    )


def leaves(step_batch):
    return [
        array
        for chunk in step_batch.chunks
        for array in (*chunk.examples.values(), chunk.mask, chunk.index)
    ]


def assert_same(left, right):
    assert left.step == right.step
    assert len(left.chunks) == len(right.chunks)
    for a, b in zip(leaves(left), leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("prefetch", [0, 1, 2, 20])
@pytest.mark.parametrize("size", [1, 4, 64])
def test_chunks_hold_exactly_the_draw_in_order(size, prefetch):
    result = list(read(size=size, prefetch=prefetch))
    assert [batch.step for batch in result] == list(STEPS)
    for batch, k in zip(result, SIZES, strict=True):
        assert len(batch.chunks) == -(-k // size)
        if not k:
            continue
        mask = np.concatenate([chunk.mask for chunk in batch.chunks])
        index = np.concatenate([chunk.index for chunk in batch.chunks])
        assert mask.dtype == bool
        assert index.dtype == np.int32
        np.testing.assert_array_equal(mask, np.arange(len(mask)) < k)
        np.testing.assert_array_equal(index[:k], draw(batch.step))
        assert (index[k:] == draw(batch.step)[-1]).all()
        for key, array in SOURCE.arrays.items():
            parts = [chunk.examples[key] for chunk in batch.chunks]
            assert {part.shape for part in parts} == {(size, *array.shape[1:])}
            rows = np.concatenate(parts)
            assert rows.dtype == array.dtype
            np.testing.assert_array_equal(rows[:k], array[draw(batch.step)])
            padding = np.broadcast_to(array[draw(batch.step)[-1]], rows[k:].shape)
            np.testing.assert_array_equal(rows[k:], padding)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_hold_together_exactly_the_chunks_of_one(processes):
    size = 8
    whole = list(read(size=size))
    parts = [
        list(read(size=size, rows=rows))
        for rows in np.array_split(np.arange(size), processes)
    ]
    for step, batch in enumerate(whole):
        of_each = [part[step] for part in parts]
        assert {b.step for b in of_each} == {batch.step}
        joined = zip(*(leaves(b) for b in of_each), strict=True)
        for together, alone in zip(joined, leaves(batch), strict=True):
            np.testing.assert_array_equal(np.concatenate(together), alone)


@pytest.mark.parametrize("start", [0, 1, 4, len(SIZES)])
def test_restart_gives_the_same_batches(start):
    tail = list(read())[start:]
    restarted = list(read(STEPS[start:]))
    for left, right in zip(tail, restarted, strict=True):
        assert_same(left, right)


class Recording:
    """A source that keeps which rows it was asked for, and refuses two readers at once."""

    def __init__(self, source):
        self.source, self.asked, self.reading = source, [], threading.Lock()

    def __len__(self):
        return len(self.source)

    def __getitem__(self, indices):
        assert self.reading.acquire(blocking=False)
        time.sleep(1e-4)
        self.asked += indices
        self.reading.release()
        return self.source[indices]


MANY = 3000
LARGE = ArraySource({"x": np.arange(MANY)})


def shuffled(step):
    return np.random.default_rng(step).permutation(MANY)


def test_each_process_reads_its_own_rows_only():
    size, parts, counts = 10, [], []
    for first in range(2):
        source = Recording(LARGE)
        rows = np.arange(first, size, 2)
        stream = read(range(1), source=source, draw=shuffled, size=size, rows=rows)
        source.asked.clear()  # one record, to know their form
        (batch,) = stream
        counts.append(len(batch.chunks))
        for chunk in batch.chunks:
            assert len(chunk.mask) == 5
        parts.append(source.asked)
    assert counts == [300, 300]
    assert len(parts[0]) == len(parts[1]) == MANY / 2  # none twice
    np.testing.assert_array_equal(parts[0], shuffled(0)[::2])
    np.testing.assert_array_equal(parts[1], shuffled(0)[1::2])


@pytest.mark.parametrize("rows", [[0], [7], [3, 4]])
def test_processes_agree_on_the_number_of_chunks_whatever_their_rows(rows):
    whole = list(read(size=8))
    part = list(read(size=8, rows=np.array(rows)))
    assert [len(b.chunks) for b in part] == [len(b.chunks) for b in whole]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_chunks_of_a_large_step_are_read_as_they_are_used(prefetch):
    source = Recording(LARGE)
    stream = read(range(2), source=source, draw=shuffled, size=10, prefetch=prefetch)
    for batch in stream:
        assert len(batch.chunks) == 300
        for _ in range(2):  # a second look gives the same
            seen = [chunk.index for chunk in batch.chunks]
            np.testing.assert_array_equal(np.concatenate(seen), shuffled(batch.step))
        for place in (0, 7, 8, 299, -1):
            np.testing.assert_array_equal(batch.chunks[place].index, seen[place])
        several = [chunk.index for chunk in batch.chunks[6:10]]
        np.testing.assert_array_equal(several, seen[6:10])
        with pytest.raises(IndexError):
            batch.chunks[300]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_memory_does_not_grow_with_the_batch(prefetch):
    class Large:
        def __len__(self):
            return MANY

        def __getitem__(self, indices):
            return {"x": np.zeros((len(indices), 10_000), np.float32)}

    tracemalloc.start()
    stream = read(range(3), source=Large(), draw=shuffled, size=10, prefetch=prefetch)
    count = 0
    for batch in stream:
        for chunk in batch.chunks:
            if not chunk.index[0] % 200:
                time.sleep(0.05)  # a slow device, and a reader that could go on
            count += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 900
    assert peak < 40e6  # a step is 120 MB


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_in_later_chunks_reach_the_caller(prefetch):
    def outside(step):
        return np.append(np.arange(MANY), MANY)

    (batch,) = read(range(1), source=LARGE, draw=outside, size=10, prefetch=prefetch)
    with pytest.raises(IndexError, match="an index is outside"):
        list(batch.chunks)


def test_steps_may_be_any_range():
    assert [batch.step for batch in read(range(6, 0, -2))] == [6, 4, 2]


def data_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain")]


def assert_threads_end():
    for thread in data_threads():
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_close_ends_the_threads():
    iterator = read()
    next(iterator)
    assert data_threads()
    iterator.close()
    assert_threads_end()
    with pytest.raises(StopIteration):
        next(iterator)


def test_exhaustion_ends_the_threads():
    iterator = read()
    assert len(list(iterator)) == len(SIZES)
    assert_threads_end()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_reach_the_caller(prefetch):
    def outside(step):
        return np.array([N if step == 2 else 0])

    iterator = read(draw=outside, prefetch=prefetch)
    assert [next(iterator).step, next(iterator).step] == [0, 1]
    with pytest.raises(IndexError, match=rf"an index is outside \[0, {N}\)"):
        next(iterator)
    assert_threads_end()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"size": 0}, "physical_batch_size=0"), ({"prefetch": -1}, "prefetch=-1")],
)
def test_bad_arguments_are_refused_at_the_call(change, message):
    with pytest.raises(ValueError, match=message):
        read(**change)


@pytest.mark.parametrize("seed", [-1, 2**128, None, "0", np.arange(4)])
def test_a_seed_that_is_no_secret_seed_is_refused_at_the_call(seed):
    plan = dpjax.NonPrivate(
        sampling=dpjax.FullBatch(), steps=1, num_examples=N, delta=1e-5
    )
    with pytest.raises(ValueError, match=r"seed of type \w+ must be dpjax.secret_seed"):
        dpjax.batches(SOURCE, plan, seed=seed, physical_batch_size=4)


def test_source_must_fit_the_int32_index():
    class Long:
        def __len__(self):
            return 2**31

    with pytest.raises(ValueError, match="int32"):
        read(source=Long())


def test_fingerprint_changes_with_the_data():
    def source(n=1000, dtype=np.int32, key="x", shape=(), at=None):
        array = np.arange(n).reshape(n, *shape).astype(dtype)
        if at is not None:
            array[at] += 1
        return ArraySource({key: array, "other": np.zeros(n)})

    base = fingerprint(source())
    # Recorded once: it must not depend on the process or on hash randomisation.
    assert base == "36de56a382447e6f"
    others = [
        source(n=1001),
        source(n=999),
        source(n=500),
        source(dtype=np.int64),
        source(dtype=np.uint32),
        source(key="y"),
        source(shape=(1,)),
        source(at=0),
        source(at=500),
    ]
    prints = [fingerprint(other) for other in others]
    assert len({base, *prints}) == 1 + len(others)


@pytest.mark.parametrize("n", [1, 2, 255, 256, 300])
def test_fingerprint_reads_at_most_256_distinct_records(n):
    class Spy:
        def __len__(self):
            return n

        def __getitem__(self, indices):
            self.indices = indices
            return {"x": np.array(indices)}

    spy = Spy()
    fingerprint(spy)
    assert len(set(spy.indices)) == len(spy.indices) == min(n, 256)
    assert spy.indices[0] == 0
    assert spy.indices[-1] < n


def test_overlap_is_the_part_of_held_out_records_that_were_trained_on():
    rows = np.arange(3000, dtype=np.float32).reshape(1500, 2)
    source = ArraySource({"x": rows[:1200]})
    assert overlap(source, ArraySource({"x": rows[1200:]})) == 0.0
    assert overlap(source, ArraySource({"x": rows[:100]})) == 1.0
    half = ArraySource({"x": rows[1150:1250]})
    assert overlap(source, half) == pytest.approx(0.5)
    assert overlap(source, ArraySource({"z": rows[:100]})) == 0.0


def test_overlap_sees_records_of_another_dtype_or_with_labels_of_another_form():
    rows, labels = np.arange(600).reshape(300, 2), np.arange(300) % 3
    source = ArraySource(
        {"x": rows.astype(np.float32), "label": labels.astype(np.int32)}
    )
    for held_out in (
        {"x": rows.astype(np.float64), "label": labels.astype(np.int64)},
        {"x": rows.astype(np.uint16), "label": np.eye(3)[labels]},
    ):
        assert overlap(source, ArraySource(held_out)) == 1.0
        moved = {**held_out, "x": held_out["x"] + 1}
        assert overlap(source, ArraySource(moved)) == 0.0


@pytest.mark.parametrize("length", [2, 5])
def test_overlap_sees_records_that_are_padded_otherwise_or_have_more_columns(length):
    tokens = np.arange(1, 1501, dtype=np.int32).reshape(500, 3)
    source = ArraySource({"tokens": tokens, "mask": np.ones((500, 3), bool)})
    other = np.zeros((600, length), np.int32)
    other[:, : min(length, 3)] = np.resize(tokens + 2, (600, 3))[:, :length]
    other[:500, : min(length, 3)] = tokens[:, :length]
    mask, weights = other > 0, np.ones((600, length), np.float32)
    held_out = ArraySource({"tokens": other, "mask": mask, "weights": weights})
    assert overlap(source, held_out) == pytest.approx(500 / 600, abs=0.01)


def test_overlap_of_very_many_records_is_estimated_from_a_part(monkeypatch):
    monkeypatch.setattr(data_batches, "MOST", 5000)
    rows = np.arange(20_480, dtype=np.float32)
    source = ArraySource({"x": rows})
    assert overlap(source, ArraySource({"x": rows + 0.5})) == 0.0
    assert overlap(source, ArraySource({"x": rows})) == pytest.approx(1, abs=0.02)
    half = np.where(np.arange(20_480) % 160 < 80, rows, rows + 0.5)
    found = overlap(source, ArraySource({"x": half.astype(np.float32)}))
    assert found == pytest.approx(0.5, abs=0.05)


class _Source:
    """A source of three records, as ``get`` gives them."""

    def __init__(self, get):
        self.get = get

    def __len__(self):
        return 3

    def __getitem__(self, indices):
        return self.get(indices)


def _one(index):
    return {"x": np.zeros(8, np.float32), "y": np.float32(0)}


NO_SOURCES = {
    "None": (None, r"NoneType has no len\(\); a source takes a list of ints"),
    "an iterable": (iter([_one(0)]), r"list_iterator has no len\(\)"),
    "no records": ([], "list has no examples"),
    "one record at a time": (_Source(_one), r"1 ints gave 'x' of shape \(8,\)"),
    "PyTorch's kind": (
        _Source(lambda index: (np.zeros(8)[index], 0)),
        r"source\[\[0\]\] is a tuple; .*PyTorch's kind",
    ),
    "a list of records": (
        _Source(lambda indices: [_one(i) for i in indices]),
        r"source\[\[0\]\] is a list",
    ),
    "lists for arrays": (
        _Source(lambda indices: {"y": [0.0 for _ in indices]}),
        r"'y' of source\[\[0\]\] is a list",
    ),
    "no fields": (_Source(lambda indices: {}), "is an empty dict"),
    "a dict": ({"x": np.zeros((3, 8))}, "raised TypeError: unhashable"),
    "an array": (np.zeros((3, 8)), r"source\[\[0\]\] is a ndarray"),
    "text": (ArraySource({"id": np.array(["a", "b"])}), "'id' has dtype <U1; leave it"),
    "fewer rows than asked": (
        _Source(lambda indices: {"x": np.zeros((1, 8))}),
        r"2 ints gave 'x' of shape \(1, 8\), not \(2, ...\)",
    ),
    "ragged": (
        _Source(lambda indices: {"x": np.zeros((len(indices), 4 + max(indices)))}),
        r"gave \{'x': 'float64\[4\]'\}, and source\[\[0, 2\]\] .*; pad what is ragged",
    ),
    "an error of its own": (
        _Source(lambda indices: np.stack([np.zeros(2), np.zeros(3)])),
        r"source\[\[0\]\] raised ValueError: all input arrays must have the same shape",
    ),
}


@pytest.mark.parametrize("name", NO_SOURCES)
def test_what_is_no_source_is_refused_with_what_it_gives(name):
    source, message = NO_SOURCES[name]
    with pytest.raises(ValueError, match=message):
        check_records(source)


@pytest.mark.parametrize(
    ("get", "message"),
    [
        (lambda i: {"x": np.zeros((min(len(i), 3), 2))}, r"gave 'x' of shape \(3, 2\)"),
        (
            lambda i: {"x": np.zeros((len(i), 4 if 2 in i else 2))},
            r"gave \{'x': 'float64\[4\]'\}, and .*\[2\].* before",
        ),
    ],
    ids=["fewer rows than asked", "ragged"],
)
def test_what_a_source_gives_is_checked_at_every_step(get, message):
    with pytest.raises(ValueError, match=message):
        list(read(source=_Source(get), draw=lambda step: np.arange(step), prefetch=0))


def test_own_loops_get_the_checks_too():
    mechanism = NonPrivate(sampling=FullBatch(), steps=1, num_examples=3, delta=1e-5)
    for source in (None, _Source(_one)):
        with pytest.raises(ValueError, match="a source takes a list of ints"):
            batches(source, mechanism, seed=0, physical_batch_size=2)
