"""What a run needs of each device: as it is when it runs, and refused where there is less."""

import re

import jax
import pytest

from dpjax.clipping.engines import auto
from dpjax.privacy.noise import root_key
from dpjax.training import memory
from dpjax.training.config import ConfigError
from dpjax.training.experiment import build_experiment
from dpjax.training.opening import plan
from dpjax.training.startup import check_parts
from dpjax.training.state import init_state
from dpjax.training.step import make_train_step
from dpjax.transforms import private
from tests.parallel.test_sharding import MECHANISMS
from tests.runs import tiny

FSDP = {"mesh.data": 1, "mesh.fsdp": 8}
WIDE = {"model.features": (64,)}


def bytes_on_first(tree):
    first = jax.devices()[0]
    total = 0
    for leaf in jax.tree.leaves(tree):
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        shards = [s for s in leaf.addressable_shards if s.device == first]
        total += sum(shard.data.nbytes for shard in shards)
    return total


@pytest.mark.parametrize("mechanism", ["DP-SGD", "DiceSGD", "BandMF"])
@pytest.mark.parametrize("mesh", [{"mesh.data": 1}, {"mesh.data": 8}, FSDP])
def test_what_is_told_is_what_a_device_holds(mesh, mechanism):
    config = tiny(**mesh | WIDE | MECHANISMS[mechanism])
    experiment = build_experiment(config)
    need = memory.needed(config, experiment, check_parts(experiment))
    optimizer, mechanism = experiment.optimizer, experiment.mechanism
    transform = private(mechanism, optimizer, noise_key=root_key(0))
    state = init_state(config, experiment, transform)
    step = make_train_step(config, experiment, transform)
    assert need.params == bytes_on_first(state.params)
    assert need.params + need.state == pytest.approx(bytes_on_first(state), rel=1e-3)
    sums = step.begin(mechanism.phase(0), state)
    assert need.sums == pytest.approx(bytes_on_first(sums), rel=1e-3)


def test_temporaries_are_those_of_the_program_that_runs():
    config = tiny(**FSDP | WIDE)
    experiment = build_experiment(config)
    shapes = check_parts(experiment)
    need = memory.compiled(config, experiment, shapes)
    whole = memory.compiled(config | {"mesh": tiny()["mesh"]}, alone(config), shapes)
    assert 0 < need.temporaries < whole.temporaries
    assert need.total == need.params + need.state + need.sums + need.temporaries


def alone(config):
    return build_experiment(config | {"mesh": tiny()["mesh"]})


def small_devices(monkeypatch, size):
    monkeypatch.setattr(memory, "device_memory", lambda: size)


def test_too_little_memory_is_refused_with_the_layout_that_fits(monkeypatch):
    config = tiny(**{"mesh.data": 8} | WIDE)
    experiment = build_experiment(config)
    shapes = check_parts(experiment)
    whole = memory.needed(config, experiment, shapes).total
    small_devices(monkeypatch, whole / 2)
    with pytest.raises(ConfigError) as caught:
        memory.checked(config, experiment, shapes)
    message = str(caught.value)
    assert "\n" not in message
    data, fsdp = map(int, re.search(r"data=(\d+), fsdp=(\d+)", message).groups())
    assert data * fsdp == 8
    assert fsdp > 1
    told = config | {"mesh": config["mesh"] | {"data": data, "fsdp": fsdp}}
    other = build_experiment(told)
    assert memory.checked(told, other, shapes).total <= whole / 2


def test_where_no_layout_fits_the_number_is_told(monkeypatch):
    config = tiny(**{"mesh.data": 8})
    small_devices(monkeypatch, 100.0)
    with pytest.raises(
        ConfigError, match="no layout of 8 devices fits, the best takes"
    ):
        plan(config)


def test_the_plan_tells_the_memory_of_each_device(capsys):
    text = plan(tiny(**FSDP))
    capsys.readouterr()
    (line,) = [line for line in text.splitlines() if "each device" in line]
    for part in ("parameters", "state", "sum", "temporaries", "1x8", "8 devices"):
        assert part in line


def test_auto_plans_for_one_of_the_devices_that_share_the_rows(monkeypatch):
    asked, choose = [], auto.choose

    def asking(program, examples, **rest):
        asked.append(examples)
        return choose(program, examples, **rest)

    monkeypatch.setattr(auto, "choose", asking)
    for mesh, rows in ((FSDP, 64 // 8), ({"mesh.data": 2, "mesh.fsdp": 4}, 64 // 8)):
        config = tiny(**mesh)
        experiment = build_experiment(config)
        memory.compiled(config, experiment, check_parts(experiment))
        assert set(asked) == {rows}
        asked.clear()
