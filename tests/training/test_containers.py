"""Parameters of any container and dtype in the loop, its checkpoints and its export."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.models.partition import flatten, merge, partition
from dpjax.training.experiment import build_experiment
from dpjax.training.export import load_export
from dpjax.training.startup import check_parts
from dpjax.training.train import train
from tests.checks import thinned
from tests.containers import NAMES, anything
from tests.runs import crash_after, tiny

pytestmark = pytest.mark.usefixtures("shared_steps")

MODEL = {"name": "tests.containers:anything", "num_classes": 10}
ADAM = {"name": "optax:adam", "learning_rate": 0.1}


def shapes():
    example = {"image": jnp.zeros((8, 8, 1)), "label": jnp.int32(0)}
    return jax.eval_shape(anything(num_classes=10).init, jax.random.key(0), example)


@pytest.mark.parametrize(
    "patterns", thinned([(("head/.*", "blocks/.*scale"),), ((".*",),)], 2)
)
def test_any_container_trains_resumes_bitwise_and_comes_back(
    patterns, tmp_path, monkeypatch
):
    config = tiny(model=MODEL, optimizer=ADAM, **{"parameters.train": patterns})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    state = train(config, whole)
    with monkeypatch.context() as patch:
        crash_after(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            train(config, broken)
    train(config, broken)
    one, other = (load_export(d / "export", like=shapes()) for d in (whole, broken))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.structure(one) == jax.tree.structure(shapes())
    assert one["blocks"][0][0].scale.dtype == jnp.bfloat16
    assert (one["blocks"][0][0].scale != 1).all()
    with np.load(whole / "export" / "params.npz") as file:
        assert [*file] == NAMES
        assert file["blocks/0/0/scale"].dtype == np.float32
    told = json.loads((whole / "export" / "parameters.json").read_text())
    assert sorted(told["trained"] + told["frozen"]) == sorted(NAMES)
    assert told["trained"] == [*flatten(state.params)]
    # Averages and moments of bfloat16 are kept in float32.
    kept = jax.tree.leaves((state.average, state.private.optimizer[0].mu))
    assert {leaf.dtype for leaf in kept} == {np.dtype(np.float32)}


@pytest.mark.long
def test_containers_and_what_is_frozen_of_them_are_spread_over_devices(tmp_path):
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.rules": ((".*", "largest"),)}
    changes = mesh | {
        "mechanism.steps": 2,
        "parameters.train": ("head/.*", "blocks/.*"),
    }
    spread, single = tmp_path / "spread", tmp_path / "single"
    config = tiny(model=MODEL, optimizer=ADAM, **changes)
    train(config, spread)
    train(config | {"mesh": config["mesh"] | {"data": 1, "fsdp": 1}}, single)
    one, other = (load_export(d / "export", like=shapes()) for d in (spread, single))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            x.astype(np.float32), y.astype(np.float32), rtol=1e-2, atol=1e-4
        ),
        one,
        other,
    )


def test_one_array_alone_is_a_model(tmp_path):
    config = tiny(model=MODEL | {"name": "tests.containers:bare"})
    check_parts(build_experiment(config))
    train(config | {"mechanism": config["mechanism"] | {"steps": 2}}, tmp_path)
    like = jax.ShapeDtypeStruct((64, 10), np.float32)
    assert load_export(tmp_path / "export", like=like).shape == (64, 10)
    assert [*load_export(tmp_path / "export")] == ["params"]


def test_a_part_of_any_container_can_be_trained():
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes())
    trained, frozen = partition(params, ["blocks/1/.*"])
    assert [*flatten(trained)] == ["blocks/1/1", "blocks/1/12"]
    assert [*flatten(frozen)] == [n for n in NAMES if not n.startswith("blocks/1/")]
    whole = merge(trained, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert all(
        x is y for x, y in zip(*map(jax.tree.leaves, (whole, params)), strict=True)
    )


def test_an_export_starts_a_model_of_any_container(tmp_path):
    config = tiny(model=MODEL)
    config["mechanism"]["steps"] = 2
    first = train(config, tmp_path)
    del first
    start = {
        "name": "dpjax.models.weights:exported",
        "model": MODEL,
        "path": str(tmp_path / "export"),
        "fresh": (),
    }
    again = build_experiment(
        tiny(model=start, **{"parameters.provenance": "private"})
    ).model
    example = {"image": jnp.zeros((8, 8, 1))}
    found = jax.jit(again.init)(jax.random.key(5), example)
    wanted = load_export(tmp_path / "export", like=shapes())
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert found["blocks"][1][1].dtype == jnp.bfloat16


COLLISIONS = {
    "two of one name": (
        {"a/b": 1.0, "a": {"b": 2.0}},
        "two parameters are named 'a/b': rename one of them",
    ),
    "an item and a key": (
        {"a": [0.0, 1.0], "a/1": 2.0},
        "two parameters are named 'a/1'",
    ),
    "a group": (
        {"a": 1.0, "a/b": 2.0},
        "'a' is a parameter, and the group of the parameter 'a/b'",
    ),
}


@pytest.mark.parametrize("case", COLLISIONS)
def test_names_that_an_export_could_not_tell_apart_are_refused(case):
    params, message = COLLISIONS[case]
    with pytest.raises(ValueError, match=message):
        flatten(params)


def test_an_export_of_another_model_is_not_taken_for_this_one(tmp_path):
    config = tiny(model=MODEL | {"name": "tests.containers:bare"})
    config["mechanism"]["steps"] = 2
    train(config, tmp_path)
    with pytest.raises(ValueError, match=r"blocks/0/0/scale.* are not in both"):
        load_export(tmp_path / "export", like=shapes())
    like = jax.ShapeDtypeStruct((64, 9), np.float32)
    with pytest.raises(ValueError, match=r"shape \(64, 10\) in it, and \(64, 9\) in"):
        load_export(tmp_path / "export", like=like)
