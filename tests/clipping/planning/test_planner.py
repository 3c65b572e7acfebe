"""The planner keeps to its budget and decides by shapes alone."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.clipping import Query, auto, bookkeeping, planned
from dpjax.clipping.analysis.uses import analyse
from dpjax.clipping.planning import planner
from dpjax.clipping.planning.costs import DEVICES, cut_bytes, group_cost, saved_bytes
from dpjax.clipping.planning.plan import make_plan
from dpjax.clipping.planning.planner import candidates, choose, estimates
from dpjax.clipping.planning.slots import find_slots
from tests.checks import batch_of, check_engine_contract

KEY = jax.random.key(0)


def transformer(*, width, positions, layers=3, vocabulary=64, remat=True):
    """Layers under scan: one table, one attention-free mixer and a head."""

    def loss(params, example, key):
        del key
        x = params["table"][example["ids"]]

        def layer(x, w):
            return x + jnp.tanh(x @ w["up"]) @ w["down"], None

        step = jax.checkpoint(layer) if remat else layer
        x, _ = jax.lax.scan(step, x, params["layers"])
        logits = jax.nn.log_softmax(x @ params["head"])
        return -jnp.mean(logits[:, 0])

    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)

    params = {
        "table": normal(vocabulary, width),
        "layers": {
            "up": normal(layers, width, 2 * width),
            "down": normal(layers, 2 * width, width),
        },
        "head": normal(width, vocabulary),
    }
    ids = rng.integers(0, vocabulary, (16, positions)).astype(np.int32)
    return loss, params, {"ids": jnp.asarray(ids)}


def program_of(**options):
    loss, params, examples = transformer(**options)
    query = Query((params,), clip_norm=1.0)
    return analyse(loss, query, batch_of(examples), KEY)


def test_of_methods_that_save_as_much_the_one_with_fewer_flops_is_taken():
    """32 positions of 64 + 64 numbers: as many as the head's gradient of 64 x 64 has."""
    program = program_of(width=64, positions=32)
    plan = make_plan(find_slots(program), saved_bytes)
    (group,) = (
        g
        for g in plan.methods
        if g.sites[0].weight_shape == (64, 64) and g.sites[0].kind == "dot_general"
    )
    saved = {m: int(saved_bytes(group, m)) for m in ("gram", "keep")}
    assert saved["gram"] == saved["keep"]
    assert plan.methods[group] == "keep"
    keep, gram = (group_cost(group, m).flops for m in ("keep", "gram"))
    assert keep < gram


def test_convolutions_save_their_images_and_not_the_patches():
    def loss(params, example, key):
        image = example["x"][None]
        return jnp.sum(jax.lax.conv(image, params["w"], (1, 1), "SAME") ** 2)

    params, examples = {"w": jnp.ones((5, 3, 3, 3))}, {"x": jnp.ones((2, 3, 8, 8))}
    query = Query((params,), clip_norm=1.0)
    program = analyse(loss, query, batch_of(examples), KEY)
    ((group,),) = (slot.groups for slot in find_slots(program))
    outputs = 8 * 8 * 5
    assert int(saved_bytes(group, "direct")) == 4 * (8 * 8 * 3 + outputs)
    assert int(cut_bytes(group, "direct")) == 4 * (8 * 8 * 3 * 9 + outputs)


def test_each_microbatch_reads_what_is_frozen_anew():
    frozen, on = jnp.ones((2000, 2000)), DEVICES["cpu"]

    def loss(params, example, key):
        del key
        return jnp.sum(jnp.tanh(example["x"] @ frozen) @ params["w"])

    params, examples = {"w": jnp.ones((2000, 3))}, {"x": jnp.ones((16, 2000))}
    query = Query((params,), clip_norm=1.0)
    program = analyse(loss, query, batch_of(examples), KEY)
    plan = next(candidates(program, on))
    one, all_ = (c.seconds for c in estimates(program, plan, (1, 16), 16, on))
    # Forward and backward pass, for 15 microbatches more.
    assert one - all_ > 15 * 2 * frozen.nbytes / on.bandwidth


@pytest.mark.parametrize("positions", [2, 64])
@pytest.mark.parametrize("budget", [4e5, 1e6, 4e6, 3e7])
def test_temporaries_of_the_compiled_program_fit_the_budget(positions, budget):
    loss, params, examples = transformer(width=32, positions=positions)
    engine = planned(memory_budget=budget)

    def run(params, batch):
        return engine(loss, Query((params,), clip_norm=1.0), batch, KEY)

    compiled = jax.jit(run).lower(params, batch_of(examples)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= budget


@pytest.mark.parametrize("budget", [4e5, 4e6])
def test_a_tight_budget_changes_nothing_but_speed(budget):
    loss, params, examples = transformer(width=32, positions=8)
    query = Query((params,), clip_norm=0.5, residual=True)
    engine = planned(memory_budget=budget)
    # Plans allow for different amounts of rounding.
    check_engine_contract(engine, loss, query, batch_of(examples), KEY, rtol=2e-4)


def test_a_budget_that_nothing_fits_is_refused_with_what_would():
    loss, params, examples = transformer(width=32, positions=64)
    with pytest.raises(
        ValueError, match=r"memory_budget=1000 bytes is too small: .* up to"
    ):
        planned(memory_budget=1000)(
            loss, Query((params,), clip_norm=1.0), batch_of(examples), KEY
        )


def test_without_a_budget_a_plan_near_the_leanest_runs_if_none_fits(monkeypatch):
    loss, params, examples = transformer(width=32, positions=8)
    query, batch = Query((params,), clip_norm=0.5), batch_of(examples)
    program = analyse(loss, query, batch, KEY)
    for on in DEVICES.values():
        least = min(
            found.peak
            for plan in candidates(program, on)
            for found in estimates(program, plan, (1, 16), 16, on)
        )
        chosen = choose(program, 16, memory_budget=1000, or_more=True, on=on)
        allowed = choose(program, 16, memory_budget=1.25 * least, on=on)
        assert chosen[1:] == allowed[1:]
        # The leanest plan itself would be much slower.
        leanest = choose(program, 16, memory_budget=least, on=on)
        assert chosen.seconds < 0.7 * leanest.seconds
    monkeypatch.setattr(
        sys.modules["dpjax.clipping.engines.auto"], "default_budget", lambda: 1
    )
    check_engine_contract(auto, loss, query, batch, KEY, rtol=2e-4)


@pytest.mark.parametrize("budget", [0, -1.0, float("nan")])
def test_a_budget_must_be_positive(budget):
    with pytest.raises(ValueError, match="must be a positive size in bytes"):
        planned(memory_budget=budget)


def test_less_memory_means_fewer_examples_at_once():
    program = program_of(width=64, positions=64)
    on = DEVICES["gpu"]
    sizes = [
        choose(program, 16, memory_budget=budget, on=on).microbatch_size
        for budget in (1e9, 8e6, 3e6)
    ]
    assert sizes[0] == 16
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 16


def methods(program):
    plan = choose(program, 16, memory_budget=1e12, on=DEVICES["gpu"]).plan
    return {
        program.names[slot.index]: plan.methods[slot.groups[0]] for slot in plan.slots
    }


def test_few_positions_take_gram_matrices_and_many_keep_gradients():
    few = methods(program_of(width=64, positions=2))
    many = methods(program_of(width=64, positions=512))
    assert few["layers/up"] == "gram"
    assert many["layers/up"] == "keep"
    assert few["table"] == "gram"


def test_gradients_of_derived_weights_are_dropped_where_keeping_them_takes_more_room():
    """Merged adapters: a few positions weigh less than the merged matrix, many do not."""

    def loss(params, example, key):
        del key
        merged = params["base"] + params["a"] @ params["b"]
        return jnp.mean(jnp.square(jnp.tanh(example["x"] @ merged)))

    rng = np.random.default_rng(0)
    shapes = {"base": (24, 16), "a": (24, 2), "b": (2, 16)}
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
    }
    query = Query((params,), clip_norm=0.05, residual=True)
    two = Query((params, params), clip_norm=0.05, signs=(1.0, -1.0))
    dropped = {}
    for positions in (2, 64):
        examples = {"x": jnp.asarray(rng.normal(size=(6, positions, 24)), jnp.float32)}
        batch = batch_of(examples, mask=[True, False, True, True, True, True])
        plan, of_two = (
            make_plan(find_slots(analyse(loss, asked, batch, KEY)), saved_bytes)
            for asked in (query, two)
        )
        dropped[positions] = plan.dropped
        # Two gradients that nearly cancel must be summed as their norm was taken.
        assert not of_two.dropped
        check_engine_contract(bookkeeping, loss, query, batch, KEY)
    assert dropped == {2: {0, 1, 2}, 64: set()}


@pytest.mark.parametrize(
    ("seconds", "peak", "preferred"),
    [
        (1.07, 0.82, True),
        (1.05, 0.92, False),  # saves less than twice what it costs
        (1.12, 0.50, False),  # is not about as fast
    ],
)
def test_a_leaner_plan_must_save_twice_what_it_costs(
    seconds, peak, preferred, monkeypatch
):
    program, on = program_of(width=64, positions=64), DEVICES["cpu"]
    fast, lean, *_ = candidates(program, on)

    def estimates(program, plan, sizes, examples, on, *, sharers):
        if plan is fast:
            yield planner.Choice(plan, 16, 1.0, 1.0)
        elif plan is lean:
            yield planner.Choice(plan, 16, seconds, peak)

    monkeypatch.setattr(planner, "candidates", lambda program, on: [fast, lean])
    monkeypatch.setattr(planner, "estimates", estimates)
    chosen = choose(program, 16, memory_budget=1e12, on=on)
    assert chosen.plan is (lean if preferred else fast)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_leaner_plan_is_chosen_where_it_is_about_as_fast(kind):
    program, on = program_of(width=128, positions=48), DEVICES[kind]
    chosen = choose(program, 16, memory_budget=1e12, on=on)
    found = [
        choice
        for plan in candidates(program, on)
        for choice in estimates(program, plan, (1, 2, 4, 8, 16), 16, on)
    ]
    fastest = min(found, key=lambda choice: choice.seconds)
    assert chosen.microbatch_size == fastest.microbatch_size
    assert chosen.seconds <= 1.1 * fastest.seconds
    assert chosen.peak < fastest.peak
