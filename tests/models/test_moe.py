"""Experts are chosen token by token, within one example, as a slow reference chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpjax
from dpjax.clipping import Query, bookkeeping, ghost
from dpjax.models.losses import causal_lm
from dpjax.models.moe import balanced_lm, moe, route
from dpjax.parallel.rules import EXPERTS
from dpjax.parallel.sharding import make_layout
from dpjax.privacy.sensitive import reveal
from experiments.benchmarks.collectives import collectives
from tests.checks import assert_close, batch_of, norm, reference

KEY = jax.random.key(0)
SIZES = {
    "vocab_size": 16,
    "length": 12,
    "layers": 2,
    "width": 8,
    "heads": 2,
    "kv_heads": 1,
    "hidden": 6,
    "experts": 4,
    "capacity_factor": 2.0,
    "rotary_base": 1e4,
    "epsilon": 1e-5,
    "dtype": "float32",
    "scan": True,
    "remat": True,
}


def one_by_one(scores, capacity):
    """Give away places as the docstring says."""
    tokens, experts = scores.shape
    chances = np.exp(scores - scores.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    order = np.argsort(-chances, axis=1, kind="stable")[:, :2]
    taken, asked = np.zeros(experts, int), np.zeros(experts)
    combined = np.zeros((tokens, experts, capacity))
    for choice in range(2):
        for token in range(tokens):
            expert = order[token, choice]
            weight = chances[token, expert] / chances[token, order[token]].sum()
            asked[expert] += 1 / (2 * tokens)
            if taken[expert] < capacity:
                combined[token, expert, taken[expert]] = weight
            taken[expert] += 1
    return combined, experts * (asked * chances.mean(axis=0)).sum()


@pytest.mark.parametrize("capacity", [1, 3, 12])
def test_places_are_given_away_as_one_by_one(capacity):
    scores = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    combined, balance = route(jnp.asarray(scores), capacity)
    expected, expected_balance = one_by_one(scores, capacity)
    np.testing.assert_allclose(combined, expected, atol=1e-6)
    assert float(balance) == pytest.approx(expected_balance, rel=1e-5)
    # Where there is room for all, every token has both of its experts in full.
    whole = np.asarray(combined).sum(axis=(1, 2))
    assert (whole < 1 - 1e-5).any() == (capacity < 12)


def test_the_balance_is_one_if_all_experts_get_as_much_and_more_if_not():
    even = np.zeros((4, 4), np.float32)
    even[np.arange(4), np.arange(4)] = even[np.arange(4), (np.arange(4) + 1) % 4] = 9
    assert float(route(jnp.asarray(even), 8)[1]) == pytest.approx(1, rel=1e-3)
    lopsided = np.zeros((4, 4), np.float32)
    lopsided[:, 0], lopsided[:, 1] = 20, 10
    assert float(route(jnp.asarray(lopsided), 8)[1]) > 1.9


def case(**changes):
    model = moe(**SIZES | changes)
    rng = np.random.default_rng(1)
    batch = batch_of({"tokens": rng.integers(0, 16, (8, 12)).astype(np.int32)})
    example = jax.tree.map(lambda x: x[0], batch.examples)
    shapes = jax.eval_shape(model.init, KEY, example)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes
    )
    return model, params, batch, example


def test_a_layer_is_its_experts_weighted_by_the_router():
    model, params, _, example = case(layers=1, scan=False, capacity_factor=4.0)
    dense, _, _, _ = case(layers=1, scan=False, capacity_factor=4.0)
    # With the same weights for all experts, whoever is chosen makes no difference.
    experts = params["layers_0"]["experts"]
    alike = {k: jnp.broadcast_to(x[:1], x.shape) for k, x in experts.items()}
    block = params["layers_0"] | {"experts": alike}
    one = model.apply(params | {"layers_0": block}, example, KEY).logits
    router = jax.tree.map(lambda x: -x, block["router"])
    other = dense.apply(
        params | {"layers_0": block | {"router": router}}, example, KEY
    ).logits
    np.testing.assert_allclose(one, other, atol=1e-5)
    found = model.apply(params, example, KEY).logits
    assert float(jnp.abs(found - one).max()) > 1e-2


def test_the_loss_adds_the_balance_and_evaluation_sees_logits_alone():
    model, params, _, example = case()
    plain = model.evaluating()
    logits = plain.apply(params, example, KEY)
    out = model.apply(params, example, KEY)
    np.testing.assert_array_equal(logits, out.logits)
    alone = causal_lm(plain)(params, example, KEY)
    both = balanced_lm(model, coefficient=0.5)(params, example, KEY)
    assert float(both - alone) == pytest.approx(0.5 * float(out.balance), rel=1e-4)


def test_every_weight_of_experts_has_a_rule():
    model, params, _, example = case()
    rows = dpjax.explain(balanced_lm(model, coefficient=0.1), params, example)
    kernels = [row for row in rows if "scale" not in row.path]
    assert {row.rule for row in kernels} == {"dense", "embedding"}
    assert sum("experts" in row.path for row in kernels) == 3


@pytest.mark.parametrize("engine", [ghost, bookkeeping])
@pytest.mark.parametrize("mesh", [(2, 1, 4), (1, 2, 4)])
def test_experts_on_several_devices_sum_as_on_one(mesh, engine):
    model, params, batch, _ = case()
    loss, query = balanced_lm(model, coefficient=0.1), Query((params,), clip_norm=0.1)
    data, fsdp, experts = mesh
    layout = make_layout(data=data, fsdp=fsdp, model=experts, rules=EXPERTS)

    def add(query, batch):
        total, statistics = engine(layout.gathering(loss), query, batch, KEY)
        return total.stacked(1), statistics

    placed = Query((layout.put(params, params),), clip_norm=0.1)
    rows = layout.place(batch, 8)
    program = jax.jit(layout.on_each(add)).lower(placed, rows).compile()
    sums, statistics = program(placed, rows)
    total, _, _, norms = reference(loss, query, batch, KEY)
    assert_close(sums.merged().total, total, rtol=2e-5, scale=norm(total))
    np.testing.assert_allclose(reveal(statistics)["norms"], norms, rtol=1e-4)
    # Tokens go to the experts, and no expert to another device.
    gathered = {
        shape
        for one in collectives(program.as_text())
        if one.kind == "all-gather"
        for shape in one.shapes
    }
    assert not gathered & {(4, 8, 6), (4, 6, 8), (2, 4, 8, 6), (2, 4, 6, 8)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"experts": 1}, "experts=1 must be at least 2: each token has two"),
        ({"experts": 0}, "experts=0 must be an integer of at least 1"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be positive and finite"),
        ({"capacity_factor": None}, "capacity_factor"),
        ({"kv_heads": 3}, "heads=2"),
    ],
)
def test_wrong_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        moe(**SIZES | wrong)


def test_a_negative_coefficient_is_refused():
    with pytest.raises(ValueError, match=r"coefficient=-1\.0 must be at least 0"):
        balanced_lm(case()[0], coefficient=-1.0)
