"""Gradients of shifts are summed before the backward pass goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.clipping import Query, resolve_engine
from dpjax.clipping.analysis.uses import analyse
from dpjax.clipping.execution import passes
from dpjax.models.convnet import groupnorm_cnn
from dpjax.models.losses import classification
from dpjax.typing import Batch

SPARING = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def images(size=8):
    rng = np.random.default_rng(0)
    return Batch(
        examples={
            "image": jnp.asarray(rng.normal(size=(size, 16, 16, 3)), jnp.float32),
            "label": jnp.arange(size) % 10,
        },
        mask=jnp.ones(size, bool),
        index=jnp.arange(size),
    )


@pytest.fixture
def convnet():
    model = groupnorm_cnn(num_classes=10)
    batch = images()
    first = jax.tree.map(lambda x: x[0], batch.examples)
    return classification(model), model.init(jax.random.key(0), first), batch


def clipped(loss):
    def run(params, batch, key):
        query = Query((params,), clip_norm=1.0)
        found, statistics = resolve_engine("bookkeeping")(loss, query, batch, key)
        return found.total, statistics.norms

    return run


def late(monkeypatch):
    interpret = passes.interpret
    monkeypatch.setattr(
        passes,
        "interpret",
        lambda *args, affine, **kwargs: interpret(*args, affine={}, **kwargs),
    )


def test_summing_early_takes_less_memory(convnet, monkeypatch):
    loss, params, batch = convnet

    def bytes_taken():
        lowered = jax.jit(clipped(loss)).lower(params, batch, jax.random.key(1))
        return lowered.compile(SPARING).memory_analysis().temp_size_in_bytes

    early = bytes_taken()
    late(monkeypatch)
    assert early < 0.95 * bytes_taken()


def test_summing_early_changes_no_value(convnet, monkeypatch):
    loss, params, batch = convnet
    early = jax.jit(clipped(loss))(params, batch, jax.random.key(1))
    late(monkeypatch)
    jax.tree.map(
        np.testing.assert_array_equal,
        early,
        jax.jit(clipped(loss))(params, batch, jax.random.key(1)),
    )


def test_a_sum_that_is_larger_than_the_scaled_data_is_left_alone():
    params = {
        "first": jnp.full((3, 3), 0.5),
        "second": jnp.ones((3, 4)),
        "shift": jnp.arange(5.0),
    }

    def loss(params, example, key):
        del key
        x = jnp.tanh(example["x"] @ params["first"]) @ params["second"]
        column = x[:, None]
        scaled = column * jnp.sum(column**2, keepdims=True)
        return jnp.sum(jnp.tanh(scaled + params["shift"][None]))

    rng = np.random.default_rng(0)
    batch = Batch(
        examples={"x": jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)},
        mask=jnp.ones(6, bool),
        index=jnp.arange(6),
    )
    query = Query((params,), clip_norm=1.0)
    program = analyse(loss, query, batch, jax.random.key(0))
    assert not program.affine
    assert len(program.sites) == 2


def test_norms_behind_more_than_one_site_are_found(convnet):
    loss, params, batch = convnet
    query = Query((params,), clip_norm=1.0)
    program = analyse(loss, query, batch, jax.random.key(0))
    convolutions = sum(
        site.kind == "conv_general_dilated" for site in program.sites.values()
    )
    assert len(program.affine) == convolutions - 1


def test_both_passes_of_ghost_round_alike(convnet, monkeypatch):
    loss, params, batch = convnet
    interpret, seen = passes.interpret, []

    def recorded(*args, affine, **kwargs):
        seen.append([*affine])
        return interpret(*args, affine=affine, **kwargs)

    monkeypatch.setattr(passes, "interpret", recorded)
    query = Query((params,), clip_norm=1.0)
    jax.eval_shape(
        lambda: resolve_engine("ghost")(loss, query, batch, jax.random.key(1))
    )
    first, second = seen
    assert first == second != []
