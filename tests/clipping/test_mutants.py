"""Plausible bugs of fast engines, each caught by the zoo or by ``verify``."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpjax
from dpjax.clipping import Query, bookkeeping, ghost
from dpjax.clipping.arithmetic import kernels, layouts
from dpjax.clipping.arithmetic.rounding import Norms
from dpjax.clipping.planning import plan, slots
from tests.checks import batch_of, norm
from tests.contracts.test_zoo import compare, known


def no_cross_terms(monkeypatch):
    """Norms of the uses of a tied weight added up as if they were orthogonal."""
    counter = itertools.count()
    identity = layouts.identity

    def alone(site):
        key = identity(site)
        return key if key is None else ((next(counter), key[0]), *key[1:])

    monkeypatch.setattr(layouts, "identity", alone)
    monkeypatch.setattr(slots, "_overlap", lambda first, second: False)


def overlap_ignored(monkeypatch):
    monkeypatch.setattr(slots, "_overlap", lambda first, second: False)


def shared_weights_probed(monkeypatch):
    """A probe in a loop adds up squares, though the steps share one weight."""
    probe = lambda slot: not slot.materialised and len(slot.sites) == 1  # noqa: E731
    monkeypatch.setattr(plan, "can_probe", probe)


def points_not_paired(monkeypatch):
    """The second point of a difference is forgotten."""
    monkeypatch.setattr(kernels, "differenced", lambda first, second: first)


def weights_in_bfloat16(monkeypatch):
    for name in ("_weighted_sum", "weighted_rows"):
        weighted = getattr(kernels, name)

        def rounded(part, weights, weighted=weighted, **options):
            weights = weights.astype(jnp.bfloat16).astype(jnp.float32)
            return weighted(part, weights, **options)

        monkeypatch.setattr(kernels, name, rounded)


def one_loop_iteration_too_few(monkeypatch):
    gram = kernels.gram_norms

    def short(parts):
        found = gram(parts)
        heads = parts[0].right.shape[0]
        return Norms(found.squares * (1 - 0.5 / heads), found.slack)

    monkeypatch.setattr(kernels, "gram_norms", short)


MUTANTS = {
    "tied_head": (bookkeeping, no_cross_terms),
    "two_uses_that_cancel": (bookkeeping, no_cross_terms),
    "slices_that_overlap": (bookkeeping, overlap_ignored),
    "gru": (ghost, shared_weights_probed),
    "dense_on_tokens": (bookkeeping, weights_in_bfloat16),
    "scan_over_layers_of_a_vector": (bookkeeping, one_loop_iteration_too_few),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_on_this_loss(name, monkeypatch):
    engine, mutate = MUTANTS[name]
    case, vectors = known(name)
    compare(lambda *args: engine(*args), case, vectors)
    mutate(monkeypatch)
    # Shapes may tell before numbers do.
    with pytest.raises((AssertionError, ValueError)):
        # A function of its own: the honest program is in jit's cache.
        compare(lambda *args: engine(*args), case, vectors)


def tied(params, example, key):
    del key
    hidden = jnp.tanh(params["w"] @ example["x"])
    return jnp.sum(jnp.square(params["w"].T @ hidden - example["x"]))


TIED = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)}
DATA = {"x": jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)), jnp.float32)}
KEY = jax.random.key(0)


def test_verify_passes_what_is_right_and_refuses_what_is_not(monkeypatch):
    def gradient():
        return dpjax.clipped_grad(
            tied, clip_norm=1.0, engine=lambda *a: bookkeeping(*a), verify=True
        )

    total, _ = gradient()(TIED, DATA, KEY)
    assert 0 < norm(total.total) <= 6
    no_cross_terms(monkeypatch)
    with pytest.raises(ValueError, match="do not train with it") as error:
        gradient()(TIED, DATA, KEY)
    assert "." not in str(error.value)  # no norm is told


def test_verify_needs_values():
    gradient = dpjax.clipped_grad(tied, clip_norm=1.0, verify=True)
    with pytest.raises(TypeError, match="cannot run under jit"):
        jax.jit(gradient.__call__)(TIED, DATA, KEY)


def test_forgetting_the_second_point_is_caught(monkeypatch):
    from tests.checks import check_engine_contract

    other = jax.tree.map(lambda w: 0.9 * w, TIED)
    query = Query((TIED, other), clip_norm=0.1, signs=(1.0, -1.0))
    check_engine_contract(lambda *a: bookkeeping(*a), tied, query, batch_of(DATA), KEY)
    points_not_paired(monkeypatch)
    with pytest.raises(AssertionError):
        check_engine_contract(
            lambda *a: bookkeeping(*a), tied, query, batch_of(DATA), KEY
        )


def test_weights_before_masking_would_let_one_bad_example_spoil_the_sum(monkeypatch):
    from tests.contracts.test_engines import CASES

    loss, params, examples = CASES["network"]
    broken = {**examples, "y": examples["y"].at[3].set(jnp.inf)}

    def total():
        run = jax.jit(lambda *a: bookkeeping(loss, *a))
        query = Query((params,), clip_norm=0.5)
        return norm(run(query, batch_of(broken), KEY)[0].total)

    assert math.isfinite(total())

    def unmasked(part, weights, **options):
        right = part.right * weights[None, :, None, None]
        return jnp.concatenate(
            [jnp.einsum("hbtk,hbtn->hkn", left, right) for left in part.left], axis=1
        )

    monkeypatch.setattr(kernels, "_weighted_sum", unmasked)
    assert not math.isfinite(total())


def test_slack_left_out_lets_an_example_through_above_the_bound(monkeypatch):
    """Where the terms of a Gram norm cancel to nothing, only the slack holds the bound."""

    def loss(params, example, key):
        del key
        out = example["x"] @ params
        signs = jnp.where(jnp.arange(64) % 2, -1.0, 1.0)[:, None]
        return 1e4 * jnp.sum(signs * out * (1 + 1e-5 * example["g"]))

    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(8, 1, 256)), 64, axis=1)
    x = x * (1 + 1e-5 * rng.normal(size=x.shape))
    data = {"x": jnp.float32(x), "g": jnp.float32(rng.normal(size=(8, 64, 4096)))}

    def worst():
        run = jax.jit(lambda *a: bookkeeping(loss, *a))
        params = jnp.zeros((256, 4096))
        query = Query((params,), clip_norm=0.5)
        norms = []
        for i in range(8):
            one = batch_of(data, mask=np.arange(8) == i)
            norms.append(norm(run(query, one, KEY)[0].total))
        return max(norms)

    assert worst() <= 0.5
    monkeypatch.setattr(kernels, "of_terms", lambda count, dtype: 0.0)
    assert worst() > 0.5
