"""The check at the start of every run: an engine that is wrong for a loss is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dpjax.clipping import ENGINES, vmap
from dpjax.training.train import train
from dpjax.training.verification.self_check import SelfCheckError
from tests.checks import thinned
from tests.runs import tiny


def scaled(factor, *, part):
    """An engine whose vector is wrong in one parameter."""

    def engine(loss, query, batch, key):
        clipped, statistics = vmap(loss, query, batch, key)

        def scale(path, x):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return factor * x if name == part else x

        total = jax.tree_util.tree_map_with_path(scale, clipped.total)
        return dataclasses.replace(clipped, total=total), statistics

    return engine


def too_long(loss, query, batch, key):
    """Its norms are too small, so it clips too little: all parameters alike."""
    wide = dataclasses.replace(query, clip_norm=1.05 * query.clip_norm)
    clipped, statistics = vmap(loss, wide, batch, key)
    return dataclasses.replace(clipped, l2_bound=query.l2_bound), statistics


def start(tmp_path, monkeypatch, engine, **changes):
    monkeypatch.setitem(ENGINES, "bookkeeping", engine)
    changes = {"run.verify": True, "compute.engine": "bookkeeping"} | changes
    train(tiny(**{"mechanism.steps": 1} | changes), tmp_path)


@pytest.mark.parametrize("factor", [0.0, 0.99, -1.0])
def test_a_wrong_gradient_stops_the_run_and_the_parameter_is_named(
    factor, tmp_path, monkeypatch
):
    with pytest.raises(SelfCheckError, match="parameter 'head/bias'") as error:
        start(tmp_path, monkeypatch, scaled(factor, part="head/bias"))
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not any(digit in str(error.value) for digit in "0123456789")


def test_a_wrong_gradient_stops_a_run_whose_parameters_are_split(tmp_path, monkeypatch):
    wrong, mesh = scaled(0.0, part="head/bias"), {"mesh.data": 2, "mesh.fsdp": 4}
    with pytest.raises(SelfCheckError, match="parameter 'head/bias'"):
        start(tmp_path, monkeypatch, wrong, **mesh)


def test_an_engine_that_is_wrong_for_later_rows_stops_the_run(tmp_path, monkeypatch):
    def forgetful(loss, query, batch, key):
        first = jnp.arange(len(batch.mask)) < len(batch.mask) // 2
        return vmap(loss, query, batch._replace(mask=batch.mask & first), key)

    with pytest.raises(SelfCheckError, match="is not that of per-example gradients"):
        start(tmp_path, monkeypatch, forgetful)


def test_a_wrong_norm_stops_the_run(tmp_path, monkeypatch):
    with pytest.raises(SelfCheckError, match="is not that of per-example gradients"):
        start(tmp_path, monkeypatch, too_long, **{"mechanism.clip_norm": 1e-2})


def test_only_the_key_lets_a_wrong_engine_run(tmp_path, monkeypatch):
    wrong = scaled(0.0, part="head/bias")
    start(tmp_path, monkeypatch, wrong, **{"run.verify": False})


@pytest.mark.parametrize(
    ("name", "data", "fsdp"),
    thinned([("auto", 2, 1), ("auto", 1, 1), ("ghost", 2, 4), ("ghost", 2, 1)], 2),
)
def test_what_ships_passes(name, data, fsdp, tmp_path):
    changes = {"run.verify": True, "compute.engine": name}
    changes |= {"mesh.data": data, "mesh.fsdp": fsdp}
    train(tiny(**{"mechanism.steps": 1} | changes), tmp_path)


def test_a_dropped_example_is_not_a_wrong_engine(tmp_path, monkeypatch):
    """All engines drop an example whose gradient is not finite."""
    monkeypatch.setattr(
        "dpjax.models.losses.classification", lambda model, **_: nan_loss
    )
    train(tiny(**{"mechanism.steps": 1, "run.verify": True}), tmp_path)


def nan_loss(params, example, key):
    return jnp.log(-1 - jnp.square(jnp.sum(params["head"]["kernel"])))
