import functools
import gc
import itertools
import logging
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpjax.parallel import processes
from dpjax.privacy.fingerprint import fingerprint
from dpjax.training.checkpoint import CheckpointError, Checkpoints
from dpjax.training.export import export, load_export
from tests.checks import thinned

# When loading fails, Orbax abandons its other reads: their coroutines complain when
# they are collected. Tests that damage a checkpoint use this and collect them.
abandons_reads = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    key: jax.Array
    keys: jax.Array


@functools.cache
def make_state(step: int) -> State:
    key = jax.random.key(step)
    weights = jax.random.uniform(key, (20, 30))
    params = {
        "weights": weights,
        "table": jax.random.bits(key, (100, 70)),  # large, and cannot be compressed
        "half": weights[0].astype(jnp.bfloat16),
        "empty": jnp.zeros((0, 3)),
        "flags": weights[1] > 0.5,
    }
    optimizer = optax.chain(optax.clip(1.0), optax.adam(1e-3))
    opt_state = optimizer.init({"weights": weights})
    return State(jnp.int32(step), params, opt_state, key, jax.random.split(key, (2, 3)))


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, two in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, two = jax.random.key_data(one), jax.random.key_data(two)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """A directory with checkpoints 1 and 2; copy it before changing it."""
    directory = tmp_path_factory.mktemp("two_steps")
    with Checkpoints(directory, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), metadata={"step": step})
    return directory


@pytest.fixture
def damaged(two_steps, tmp_path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "damaged"))


def array_files(step_directory: Path) -> list[Path]:
    """The files that hold array values which are too large to be in a manifest."""
    data = step_directory / "state" / "ocdbt.process_0" / "d"
    files = list(data.iterdir())
    assert sum(file.stat().st_size for file in files) > 28_000
    return files


def flip_bit(file: Path, *, position: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(position * len(content))] ^= 0x10
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def test_round_trip_restores_every_leaf_bit_for_bit(two_steps):
    like = jax.eval_shape(lambda state: state, make_state(0))
    step, state = Checkpoints(two_steps, keep=2).restore(like)
    assert step == 2
    assert_same(state, make_state(2))
    # Going on needs keys that are keys, and arrays that are not tied to a device.
    assert jax.random.uniform(state.key) == jax.random.uniform(jax.random.key(2))
    assert not any(leaf.committed for leaf in jax.tree.leaves(state))


def test_round_trip_keeps_the_key_implementation(tmp_path):
    state = {"key": jax.random.key(3, impl="rbg")}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, metadata={})
        _, restored = checkpoints.restore(state)
    assert_same(restored, state)


def test_leaves_take_the_sharding_of_like(tmp_path):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.NamedSharding(mesh, jax.P("data"))
    replicated = jax.NamedSharding(mesh, jax.P())
    state = {
        "rows": jax.device_put(jnp.arange(32.0).reshape(8, 4), sharded),
        "keys": jax.device_put(jax.random.split(jax.random.key(0), 8), sharded),
        "empty": jnp.zeros((0, 4)),
    }
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for (name, leaf), sharding in zip(
            state.items(), (replicated, sharded, replicated), strict=True
        )
    }
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, metadata={})
        _, restored = checkpoints.restore(like)
    assert_same(restored, state)
    assert {n: x.sharding for n, x in restored.items()} == {
        n: x.sharding for n, x in like.items()
    }


def test_save_copies_before_the_arrays_are_donated(tmp_path):
    increment = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = jnp.zeros((1000, 1000))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"x": state}, metadata={})
        for _ in range(10):
            state = increment(state)
        _, restored = checkpoints.restore({"x": state})
    assert not restored["x"].any()


def test_metadata_is_the_newest_and_json(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.metadata() is None
        for step in (1, 2):
            metadata = {"step": step, "shape": (3, 4), "noise": 0.1, "text": "ε"}
            checkpoints.save(step, {"x": jnp.ones(3)}, metadata=metadata)
        assert checkpoints.metadata() == metadata | {"shape": [3, 4]}


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}])
def test_metadata_that_is_not_json_is_refused(tmp_path, value):
    with (
        Checkpoints(tmp_path, keep=1) as checkpoints,
        pytest.raises(ValueError, match="metadata must be JSON"),
    ):
        checkpoints.save(1, {"x": jnp.ones(3)}, metadata={"value": value})


def test_only_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest is None
        for step in (5, 7, 9, 10):
            checkpoints.save(step, {"x": jnp.ones(3)}, metadata={})
        checkpoints.wait()
        assert names(tmp_path) == ["10", "9"]
        assert checkpoints.latest == 10


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(4, {"x": jnp.ones(3)}, metadata={})
        with pytest.raises(ValueError, match="step=4 must be later than latest=4"):
            checkpoints.save(4, {"x": jnp.ones(3)}, metadata={})
        with pytest.raises(TypeError, match=r"state\['x'\] is a float"):
            checkpoints.save(5, {"x": 1.0}, metadata={})


def test_directories_are_for_the_owner_only(tmp_path):
    fresh, open_to_all = tmp_path / "fresh", tmp_path / "open"
    open_to_all.mkdir(mode=0o755)
    for directory in (fresh, open_to_all):
        with Checkpoints(directory, keep=1) as checkpoints:
            checkpoints.save(1, {"key": jax.random.key(0)}, metadata={})
        for path in (directory, directory / "1"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_leftovers_of_interrupted_saves_are_removed(damaged):
    shutil.copytree(damaged / "2", damaged / "3.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(damaged, keep=2)
    assert names(damaged) == ["1", "2"]
    assert checkpoints.latest == 2


def test_never_saved_is_none(tmp_path):
    assert Checkpoints(tmp_path / "new", keep=1).restore(make_state(0)) is None


def restore_after_damage(directory: Path, caplog) -> int:
    """Restore, check all that must hold, and return the step."""
    with caplog.at_level(logging.WARNING, logger="dpjax.training.checkpoint"):
        step, state = Checkpoints(directory, keep=2).restore(make_state(0))
    assert_same(state, make_state(step))
    quarantined = [n for n in names(directory) if n.startswith("corrupt-2-")]
    reported = [r for r in caplog.records if r.name == "dpjax.training.checkpoint"]
    assert len(quarantined) == len(reported) == (0 if step == 2 else 1)
    gc.collect()
    return step


@abandons_reads
@pytest.mark.parametrize("damage", thinned([(flip_bit,), (truncate,), (os.unlink,)], 3))
def test_damage_to_any_file_never_changes_the_values(
    two_steps, tmp_path, caplog, damage
):
    pristine = two_steps / "2"
    files = [path for path in sorted(pristine.rglob("*")) if path.is_file()]
    fell_back = set()
    for i, file in enumerate(files):
        caplog.clear()
        directory = Path(shutil.copytree(two_steps, tmp_path / str(i)))
        if file.stat().st_size or damage is not flip_bit:
            damage(directory / file.relative_to(two_steps))
        if restore_after_damage(directory, caplog) == 1:
            fell_back.add(file)
    record = pristine / "_CHECKPOINT_METADATA"
    assert {record, *array_files(pristine)} <= fell_back


@pytest.mark.parametrize("position", [0.2, 0.5, 0.8])
def test_a_flipped_bit_is_reported_with_its_leaf(damaged, caplog, position):
    (file,) = array_files(damaged / "2")
    flip_bit(file, position=position)
    assert restore_after_damage(damaged, caplog) == 1
    # The table fills nearly the whole file.
    assert "state.params['table'] differs" in caplog.text


@abandons_reads
def test_a_missing_array_is_reported_with_its_leaf(damaged, caplog):
    (file,) = array_files(damaged / "2")
    truncate(file)
    assert restore_after_damage(damaged, caplog) == 1
    assert re.search(r"state\.\S+ cannot be decoded", caplog.text)


def test_an_empty_step_directory_is_quarantined(damaged, caplog):
    shutil.rmtree(damaged / "2")
    (damaged / "2").mkdir()
    assert Checkpoints(damaged, keep=2).metadata() == {"step": 1}
    assert restore_after_damage(damaged, caplog) == 1


def test_a_lost_step_can_be_made_and_saved_again(damaged):
    flip_bit(*array_files(damaged / "2"))
    with Checkpoints(damaged, keep=2) as checkpoints:
        assert checkpoints.restore(make_state(0))[0] == 1
        assert checkpoints.latest == 1
        checkpoints.save(2, make_state(2), metadata={}, wait=True)
        step, state = checkpoints.restore(make_state(0))
    assert step == 2
    assert_same(state, make_state(2))


def test_all_corrupt_is_an_error_and_stays_one(damaged):
    for step in ("1", "2"):
        flip_bit(*array_files(damaged / step))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"every checkpoint .* is corrupt"):
            Checkpoints(damaged, keep=2).restore(make_state(0))
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is corrupt"):
        Checkpoints(damaged, keep=2).metadata()
    assert all(name.startswith("corrupt-") for name in names(damaged))
    assert len(names(damaged)) == 2


@abandons_reads
@pytest.mark.parametrize("which", ["array", "record", "manifest"])
def test_an_unreadable_file_is_an_os_error_and_changes_nothing(damaged, which):
    (array_file,) = array_files(damaged / "2")
    file = {
        "array": array_file,
        "record": damaged / "2" / "_CHECKPOINT_METADATA",
        "manifest": damaged / "2" / "state" / "manifest.ocdbt",
    }[which]
    away = file.rename(damaged.parent / "away")
    file.symlink_to(file.name)  # a loop: opening it fails, even for root
    with pytest.raises(OSError, match="symbolic links"):
        Checkpoints(damaged, keep=2).restore(make_state(0))
    assert names(damaged) == ["1", "2"]
    file.unlink()
    away.rename(file)
    assert Checkpoints(damaged, keep=2).restore(make_state(0))[0] == 2
    gc.collect()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"params": {"weights": jnp.zeros((2, 3))}},
            r"state\.params\['weights'\] is float32\[20, 30\] .* float32\[2, 3\] here",
        ),
        (
            {"step": jnp.float32(0)},
            r"state\.step is int32\[\] in the checkpoint and float32\[\] here",
        ),
        ({"more": jnp.ones(3)}, r"state\.more.* is absent in the checkpoint"),
        (
            {"key": None},
            r"state\.key is key<fry>\[\] in the checkpoint and absent here",
        ),
    ],
)
def test_another_structure_is_the_callers_error(damaged, change, message):
    like = make_state(0)
    if "params" in change:
        change = {"params": like.params | change["params"]}
    if "more" in change:
        more = NamedTuple("More", [(name, object) for name in (*State._fields, "more")])
        like = more(*like, more=None)
    like = like._replace(**change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(damaged, keep=2).restore(like)
    assert names(damaged) == ["1", "2"]


@abandons_reads
def test_an_impossible_sharding_is_not_taken_for_corruption(damaged):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    uneven = jax.NamedSharding(mesh, jax.P(None, "data"))  # 70 columns on 4 devices
    like = jax.eval_shape(lambda state: state, make_state(0))
    table = jax.ShapeDtypeStruct((100, 70), jnp.uint32, sharding=uneven)
    like = like._replace(params=like.params | {"table": table})
    with pytest.raises(ValueError, match="70"):
        Checkpoints(damaged, keep=2).restore(like)
    assert names(damaged) == ["1", "2"]
    gc.collect()


KILLED_WHILE_SAVING = """
import sys
from pathlib import Path
import jax.numpy as jnp
from dpjax.training.checkpoint import Checkpoints

with Checkpoints(Path(sys.argv[1]), keep=2) as checkpoints:
    for step in range(1, 10_000):
        state = {"x": jnp.arange(1_000_000.0) + step}
        checkpoints.save(step, state, metadata={"step": step})
        print(step - 1, flush=True)  # complete: a save waits for the one before
"""


def test_killed_while_saving_leaves_the_previous_intact(tmp_path):
    delays = (0.0, 0.02, 0.05)
    children = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                "-c",
                KILLED_WHILE_SAVING,
                tmp_path / str(i),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(len(delays))
    ]
    for i, (child, delay) in enumerate(zip(children, delays, strict=True)):
        complete = [child.stdout.readline() for _ in range(4)]
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        complete += child.communicate()[0].splitlines()
        assert child.returncode == -signal.SIGKILL
        checkpoints = Checkpoints(tmp_path / str(i), keep=2)
        step, state = checkpoints.restore({"x": jnp.zeros(1_000_000)})
        assert step >= int(complete[-1]) >= 3
        np.testing.assert_array_equal(state["x"], jnp.arange(1_000_000.0) + step)
        assert all(name.isdigit() for name in names(tmp_path / str(i)))


@pytest.fixture
def disk_that_fills_up():
    """Call it, and no file can grow beyond 100 kB: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "surface",
    [
        lambda checkpoints, state: checkpoints.save(3, state, metadata={}),
        lambda checkpoints, _: checkpoints.wait(),
        lambda checkpoints, _: checkpoints.__exit__(None, None, None),
    ],
    ids=["save", "wait", "exit"],
)
def test_a_full_disk_is_a_clear_error(tmp_path, disk_that_fills_up, surface):
    state = {"x": jax.random.uniform(jax.random.key(0), (1000, 100))}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, metadata={}, wait=True)
    disk_that_fills_up()
    checkpoints.save(2, state, metadata={})
    message = r"step 2 to .* failed; the previous checkpoint, of step 1, is intact"
    with pytest.raises(CheckpointError, match=message):
        surface(checkpoints, state)
    assert names(tmp_path) == ["1"]  # and the space is free again
    step, restored = checkpoints.restore(state)
    assert step == 1
    assert_same(restored, state)


def test_a_first_save_that_fails_says_so(tmp_path, disk_that_fills_up):
    checkpoints = Checkpoints(tmp_path, keep=1)
    disk_that_fills_up()
    state = {"x": jax.random.uniform(jax.random.key(0), (1000, 100))}
    with pytest.raises(CheckpointError, match="there is no earlier checkpoint"):
        checkpoints.save(2, state, metadata={}, wait=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint32", "bool"])
def test_fingerprint_detects_every_bit_flip_and_swap(dtype):
    rng = np.random.default_rng(0)
    low, high = (0, 2) if dtype == "bool" else (0, 100)
    array = rng.integers(low, high, (2, 3)).astype(jnp.dtype(dtype))
    changed = []
    for byte in range(array.nbytes):
        for bit in range(1 if dtype == "bool" else 8):
            flipped = bytearray(array.tobytes())
            flipped[byte] ^= 1 << bit
            changed.append(np.frombuffer(flipped, array.dtype).reshape(array.shape))
    for i, j in itertools.combinations(range(array.size), 2):
        swapped = array.ravel()[[*range(i), j, *range(i + 1, j), i, *range(j + 1, 6)]]
        if not np.array_equal(swapped, array.ravel()):
            changed.append(swapped.reshape(array.shape))
    assert len(changed) > array.size * array.itemsize * (1 if dtype == "bool" else 8)
    jitted = jax.jit(fingerprint)
    assert jitted(array) not in [jitted(other) for other in changed]


def test_fingerprint_is_the_same_under_every_sharding():
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(auto, auto))
    values = jax.random.uniform(jax.random.key(0), (8, 6)).astype(jnp.bfloat16)
    keys = jax.random.split(jax.random.key(1), (8, 2))
    jitted = jax.jit(fingerprint)
    for array in (values, keys):
        for spec in (jax.P(), jax.P("a"), jax.P(("a", "b")), jax.P("b", "a")):
            placed = jax.device_put(array, jax.NamedSharding(mesh, spec))
            assert jitted(placed) == jitted(array)
        assert jitted(jax.device_put(array, jax.devices()[3])) == jitted(array)


def test_fingerprint_is_part_of_the_format_on_disk():
    # If it changes, every checkpoint made before is taken for corrupt.
    assert int(fingerprint(jnp.arange(6.0).reshape(2, 3))) == 3757635346


PARAMS = {
    "dense": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)},
    "scale": np.float32(2.0),
    "count": {"deep": {"er": np.arange(3, dtype=np.int32)}},
}


def test_export_round_trip(tmp_path):
    params = jax.tree.map(jnp.asarray, PARAMS)
    export(
        tmp_path / "out" / "model", params, {"card.md": "# ε = 1\n", "card.json": "{}"}
    )
    out = tmp_path / "out"
    assert names(out) == ["model"]
    assert names(out / "model") == ["card.json", "card.md", "params.npz"]
    assert (out / "model" / "card.md").read_text(encoding="utf-8") == "# ε = 1\n"
    assert_same(load_export(out / "model"), PARAMS)
    with np.load(out / "model" / "params.npz") as file:  # readable without dpjax
        assert set(file) == {"dense/kernel", "scale", "count/deep/er"}


def test_an_export_holds_one_leaf_at_a_time_on_the_host(tmp_path, monkeypatch):
    params = {f"w{i}": jnp.full(1000, i, jnp.bfloat16) for i in range(5)}
    fetch, seen = processes.to_host, []

    def fetching(leaf):
        # bfloat16: what is written is a copy, and what was fetched before is gone.
        assert not [ref for ref in seen[:-1] if ref() is not None]
        array = np.array(fetch(leaf))
        seen.append(weakref.ref(array))
        return array

    monkeypatch.setattr(processes, "to_host", fetching)
    export(tmp_path / "model", params, {})
    assert len(seen) == len(params)
    exported = load_export(tmp_path / "model")
    for i in range(5):
        np.testing.assert_array_equal(exported[f"w{i}"], np.full(1000, i, np.float32))


def test_export_holds_no_secret(tmp_path):
    secret = jax.random.key_data(jax.random.key(np.uint32(0xDEADBEEF)))
    state = make_state(0)._replace(key=jax.random.wrap_key_data(secret))
    export(tmp_path / "model", {"w": state.params["weights"]}, {"card.md": "text"})
    content = b"".join(path.read_bytes() for path in (tmp_path / "model").iterdir())
    assert np.asarray(state.params["weights"]).tobytes() in content
    for word in np.asarray(secret)[np.asarray(secret) != 0]:
        assert word.astype("<u4").tobytes() not in content
        assert word.astype(">u4").tobytes() not in content


def test_export_refuses_to_overwrite(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(
        FileExistsError, match="exists: remove it, or export to a new one"
    ):
        export(tmp_path / "model", PARAMS, {})
    assert names(tmp_path / "model") == []


def test_an_export_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        export(tmp_path / "model", PARAMS, {"card.md": "\ud800"})
    assert names(tmp_path) == []


def test_export_refuses_names_that_it_could_not_tell_apart(tmp_path):
    with pytest.raises(ValueError, match="the group of the parameter 'a/b'"):
        export(tmp_path / "model", {"a": jnp.ones(3), "a/b": jnp.ones(3)}, {})
    assert names(tmp_path) == []


def test_bfloat16_is_exported_as_float32_and_comes_back_exactly(tmp_path):
    params = {"w": jnp.array([0.1, 1e30, -1e-40, jnp.inf], jnp.bfloat16)}
    export(tmp_path / "model", params, {})
    with np.load(tmp_path / "model" / "params.npz") as file:
        assert file["w"].dtype == np.float32
    found = load_export(tmp_path / "model", like=params)
    assert found["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["w"], np.asarray(params["w"]))


@pytest.mark.parametrize("name", ["params.npz", "../card.md", "a/b.md"])
def test_export_refuses_card_names_that_leave_or_collide(tmp_path, name):
    with pytest.raises(ValueError, match="plain, unused file name"):
        export(tmp_path / "model", PARAMS, {name: "text"})
    assert names(tmp_path) == []
