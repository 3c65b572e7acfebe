"""However the devices are laid out, the same draws, noise and sums; and one reduction.

Data parallelism is where clipping is broken silently: see
``test_a_mesh_of_shared_parameters_sums_gradients_before_they_are_clipped``.
"""

import dataclasses
import functools
import itertools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from dpjax.checks import check_rows
from dpjax.clipping import Query, auto, bookkeeping, ghost, microbatched, vmap
from dpjax.clipping.arithmetic.rounding import row_norms
from dpjax.data.batches import StepBatch, batches
from dpjax.models.gpt2 import gpt2
from dpjax.models.llama import llama
from dpjax.models.losses import causal_lm
from dpjax.models.partition import name_of
from dpjax.parallel.rules import TRANSFORMER, VOCABULARY
from dpjax.parallel.sharding import AXES, make_layout
from dpjax.privacy.noise import root_key
from dpjax.privacy.sensitive import SEAL, ClippedSum, opened, reveal
from dpjax.training.experiment import build_experiment
from dpjax.training.state import init_state, sampling_seed
from dpjax.training.step import make_train_step
from dpjax.transforms import private
from experiments.benchmarks.collectives import collectives
from tests.checks import (
    assert_close,
    batch_of,
    norm,
    reference,
    thinned,
)
from tests.runs import tiny

ALONE = (1, 1, 1)
SPLIT = [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 1, 2)]
"""Replicated, fully sharded, hybrid, with tensor parallelism, and that alone."""
MESHES = [ALONE, *SPLIT]
LARGEST = ((".*", "largest"),)
BOTH = ((".*", "largest", -1),)
"""Outputs are split over "model", the largest other dimension over "fsdp"."""
KEY = jax.random.key(0)


def layout_of(mesh, rules=None):
    data, fsdp, model = mesh
    if rules is None:
        rules = BOTH if model > 1 else LARGEST
    return make_layout(data=data, fsdp=fsdp, model=model, rules=rules)


# --- Sums ---------------------------------------------------------------------------

ENGINES = {
    "vmap": vmap,
    "microbatched": microbatched(vmap, size=2),
    "bookkeeping": bookkeeping,
    "ghost": ghost,
    "auto": auto,
}


def two_layers(params, example, key):
    hidden = jnp.tanh(example["x"] @ params["w"])
    hidden = hidden * (1 + 0.1 * jax.random.uniform(key, hidden.shape))
    return jnp.square(hidden @ params["v"] - example["y"])


def dot(params, example, key):
    """With integer data, gradients and their sums are exact in any order."""
    return jnp.sum(params["w"] * example["x"])


def data(rows=32):
    rng = np.random.default_rng(0)
    batch = batch_of(
        {
            "x": rng.normal(size=(rows, 4)).astype(np.float32),
            "y": rng.normal(size=rows).astype(np.float32),
        },
        mask=np.arange(rows) < rows - 5,
        index=rng.permutation(1000)[:rows].astype(np.int32),
    )
    params = {
        "w": jnp.asarray(rng.normal(size=(4, 8)), jnp.float32),
        "v": jnp.asarray(rng.normal(size=8), jnp.float32),
    }
    moved = jax.tree.map(lambda p: p + 0.1, params)
    return params, moved, batch


def sums_on(layout, engine, loss, query, chunks):
    """The sum over ``chunks`` as the loop forms it: partial sums, merged once."""

    loss = layout.gathering(loss)

    def add(query, split):
        sums, batch = split
        clipped, statistics = engine(loss, query, batch, KEY)
        return sums.only().merge(clipped).stacked(1), statistics

    @jax.jit
    def run(query, chunks):
        sums = query.empty().stacked(layout.replicas)
        statistics = []
        for chunk in chunks:
            sums, found = layout.on_each(add)(query, (sums, chunk))
            statistics.append(found)
        return sums, statistics, sums.merged()

    rows = len(chunks[0].mask)
    return run(query, [layout.place(chunk, rows) for chunk in chunks])


@functools.cache
def known(name):
    params, moved, batch = data()
    query = {
        "residual": Query(
            (params,), clip_norm=0.5, residual=True, outer_norm=2.0, count=True
        ),
        "difference": Query((params, moved), signs=(1.0, -1.0), clip_norm=0.05),
    }[name]
    return query, batch, reference(two_layers, query, batch, KEY)


@pytest.mark.parametrize(
    ("engine", "query", "mesh"),
    thinned(itertools.product(ENGINES, ("residual", "difference"), SPLIT), 3),
)
def test_every_engine_sums_the_same_on_every_mesh(engine, query, mesh):
    query, batch, (total, residual, count, norms) = known(query)
    _, (statistics,), found = sums_on(
        layout_of(mesh), ENGINES[engine], two_layers, query, [batch]
    )
    scale = max(norm(total), norm(residual))
    assert_close(found.total, total, rtol=1e-5, scale=scale)
    if query.residual:
        assert_close(found.residual, residual, rtol=1e-5, scale=scale)
        assert float(found.count) == count
    np.testing.assert_allclose(reveal(statistics)["norms"], norms, rtol=1e-4)
    assert float(found.seal) == np.float32(SEAL)
    assert float(found.l2_bound) == np.float32(query.clip_norm)


@pytest.mark.parametrize(
    ("engine", "mesh"), thinned(itertools.product(ENGINES, SPLIT), 3)
)
def test_one_example_moves_the_sum_by_the_clip_norm_on_every_mesh(engine, mesh):
    """Gradients that devices would add up before they clip are longer, or clipped too far."""
    _, _, batch = data()
    alone = batch._replace(mask=np.arange(len(batch.mask)) == 3)
    huge = dataclasses.replace(known("residual")[0], clip_norm=0.01, residual=False)
    norms = known("residual")[2][3]
    _, (statistics,), found = sums_on(
        layout_of(mesh), ENGINES[engine], two_layers, huge, [alone]
    )
    assert norm(found.total) == pytest.approx(0.01, rel=1e-3)
    assert norm(found.total) <= 0.01 * (1 + 1e-6)
    np.testing.assert_allclose(reveal(statistics)["norms"][3], norms[3], rtol=1e-4)


@pytest.mark.parametrize("mesh", MESHES)
def test_each_example_is_in_the_sum_exactly_once(mesh):
    rng = np.random.default_rng(1)
    parts = [
        batch_of({"x": rng.integers(-9, 9, size=(16, 4)).astype(np.float32)}, mask=mask)
        for mask in (np.ones(16, bool), np.arange(16) < 3)
    ]
    query = Query(({"w": jnp.zeros(4)},), clip_norm=64.0)
    sums, _, total = sums_on(layout_of(mesh), vmap, dot, query, parts)
    expected = sum(part.examples["x"][part.mask].sum(axis=0) for part in parts)
    np.testing.assert_array_equal(total.total["w"], expected)
    # Nothing has been reduced before the end: the parts are each replica's own.
    rows = [part.examples["x"] * part.mask[:, None] for part in parts]
    own = sum(x.reshape(mesh[0], -1, 4).sum(axis=1) for x in rows)
    np.testing.assert_array_equal(sums.total["w"], own)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_mesh_of_shared_parameters_sums_gradients_before_they_are_clipped(check_vma):
    """The defect that ``check_vma=False`` keeps out of ``Layout.on_each``.

    By default shard_map makes the gradient for parameters that all devices share a sum over
    devices. Under vmap that is one sum for each row, before any clipping: an example then
    moves the result by far more than the clip norm. No error, no warning. Should this test
    fail because JAX has changed, its reason is gone, and the flag may go too.
    """
    params, _, batch = data()
    query = Query((params,), clip_norm=0.5)
    layout = layout_of((8, 1, 1))
    naive = jax.shard_map(
        lambda params, batch: jax.lax.psum(
            vmap(two_layers, Query((params,), clip_norm=0.5), batch, KEY)[0].total,
            ("data", "fsdp"),
        ),
        mesh=layout.mesh,
        in_specs=(PartitionSpec(), PartitionSpec(("data", "fsdp"))),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )
    program = jax.jit(naive).lower(params, batch).compile()
    moved = {s for c in collectives(program.as_text()) for s in c.shapes}
    total = known_total(query, batch)
    error = norm(jax.tree.map(np.subtract, program(params, batch), total))
    per_example = {(4, 4, 8), (4, 8)} - {leaf.shape for leaf in params.values()}
    if check_vma:
        assert error > 0.1 * norm(total)
        assert moved & per_example
    else:
        assert error < 1e-5 * norm(total)
        assert not moved & per_example


def known_total(query, batch):
    return reference(two_layers, query, batch, KEY)[0]


# --- Partial sums keep their seal ------------------------------------------------------


def stack(*sums):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *sums)


def test_partial_sums_with_a_broken_seal_or_different_bounds_poison_their_sum():
    good = ClippedSum.zeros({"w": jnp.ones(2)}, l2_bound=1.0)
    assert not np.isnan(opened(stack(good, good).merged(), l2_bound=1.0)["w"]).any()
    wrong = [
        dataclasses.replace(good, seal=2 * good.seal),
        ClippedSum.zeros({"w": jnp.ones(2)}, l2_bound=0.5),
        ClippedSum.zeros({"w": jnp.ones(2)}, l2_bound=1.0, outer_norm=3.0),
    ]
    for bad in wrong:
        for stacked in (stack(good, bad), stack(bad, good)):
            assert np.isnan(opened(stacked.merged(), l2_bound=1.0)["w"]).all()


def test_the_sum_of_partial_sums_is_what_merging_them_gives():
    parts = [
        dataclasses.replace(
            ClippedSum.zeros({"w": jnp.ones(2)}, l2_bound=1.0, outer_norm=2.0),
            total={"w": jnp.array([i, 1.0])},
            residual={"w": jnp.array([2.0, i])},
            count=jnp.float32(i),
        )
        for i in range(4)
    ]
    merged, expected = stack(*parts).merged(), functools.reduce(ClippedSum.merge, parts)
    jax.tree.map(np.testing.assert_array_equal, merged, expected)


def test_partial_sums_are_not_released():
    sums = ClippedSum.zeros({"w": jnp.ones(2)}, l2_bound=1.0).stacked(1)
    with pytest.raises(TypeError, match="release their sum"):
        opened(sums, l2_bound=1.0)


# --- Runs ---------------------------------------------------------------------------------

DICE = {
    "mechanism.name": "dpjax.mechanisms:DiceSgd",
    "mechanism.error_clip_norm": 1.0,
    "mechanism.error_scale": "sum",
    "mechanism.outer_norm": None,
    "mechanism.accounting": "conservative",
}
DIFF2 = {
    "mechanism.name": "dpjax.mechanisms:Diff2",
    "mechanism.difference_clip_norm": 2.0,
    "mechanism.restart_every": 2,
    "mechanism.noise_ratio": 1.0,
    "mechanism.noisy_workers": 1,
    "mechanism.sampling": {"name": "dpjax.privacy:FullBatch"},
    "compute.physical_batch_size": 1024,
}
ADAPTIVE = {
    "mechanism": {
        "name": "dpjax.mechanisms:AdaptiveDpSgd",
        "initial_clip_norm": 1.0,
        "min_clip_norm": 0.01,
        "max_clip_norm": 10.0,
        "target_quantile": 0.5,
        "clip_learning_rate": 0.2,
        "count_share": 0.1,
        "noise_multiplier": 4.0,
        "sampling": {"name": "dpjax.privacy:Poisson", "rate": 0.1},
        "steps": 12,
        "delta": 1e-5,
    }
}
BAND_MF = {
    "mechanism": {
        "name": "dpjax.mechanisms:BandMf",
        "clip_norm": 1.0,
        "clip_style": "flat",
        "noise_multiplier": 4.0,
        "bands": 3,
        "strategy": "mean_error",
        "sampling": {"name": "dpjax.privacy:CyclicPoisson", "cycle": 4, "rate": 0.4},
        "steps": 12,
        "delta": 1e-5,
    }
}
MECHANISMS = {
    "DP-SGD": {},
    "DiceSGD": DICE,
    "DIFF2": DIFF2,
    "adaptive": ADAPTIVE,
    "BandMF": BAND_MF,
}


ENGINE_OF = {
    "DP-SGD": "ghost",
    "DiceSGD": "bookkeeping",
    "DIFF2": "bookkeeping",
    "adaptive": "auto",
    "BandMF": "vmap",
}
"""Each engine runs on each mesh; all products would show no more."""


class Run:
    """Some steps of the real loop's parts on a mesh, with few parameters."""

    def __init__(self, mesh, **changes):
        config = tiny(
            **dict(zip(("mesh.data", "mesh.fsdp", "mesh.model"), mesh, strict=True))
            | {"mesh.rules": BOTH if mesh[2] > 1 else LARGEST, "model.features": ()}
            | {"compute.engine": "vmap"}
            | changes
        )
        if "mechanism.name" in changes and "Diff2" in changes["mechanism.name"]:
            del config["mechanism"]["clip_style"]
        self.experiment = build_experiment(config)
        self.mechanism, self.layout = self.experiment.mechanism, self.experiment.layout
        self.size = config["compute"]["physical_batch_size"]
        transform = private(
            self.mechanism, self.experiment.optimizer, noise_key=root_key(1)
        )
        self.state = init_state(config, self.experiment, transform)
        self.step = make_train_step(config, self.experiment, transform)

    def batches(self):
        return batches(
            self.experiment.source,
            self.mechanism,
            seed=sampling_seed(self.state),
            physical_batch_size=self.size,
            rows=self.layout.rows(self.size),
        )

    def params(self):
        return jax.tree.map(np.asarray, self.state.params)


@functools.cache
def run_of(mechanism, mesh):
    """Noise of a step without examples, draws, and parameters after three steps."""
    run = Run(mesh, **{"compute.engine": ENGINE_OF[mechanism]} | MECHANISMS[mechanism])
    start = run.params()
    run.state, noise, _ = run.step(run.state, StepBatch(0, ()))
    draws, seen = [], run.batches()
    for _ in range(3):
        batch = next(seen)
        draws += [run.layout.place(chunk, run.size) for chunk in batch.chunks[:2]]
        if batch.step:
            run.state, _, _ = run.step(run.state, batch)
    seen.close()
    return start, int(noise.fingerprint), draws, run


@pytest.mark.parametrize(
    ("mechanism", "mesh"), thinned(itertools.product(MECHANISMS, SPLIT), 4)
)
def test_every_mesh_starts_draws_and_adds_noise_alike(mechanism, mesh):
    start, noise, draws, _ = run_of(mechanism, ALONE)
    found_start, found_noise, found_draws, _ = run_of(mechanism, mesh)
    jax.tree.map(np.testing.assert_array_equal, found_start, start)
    assert found_noise == noise
    jax.tree.map(np.testing.assert_array_equal, found_draws, draws)


@pytest.mark.parametrize(
    ("mechanism", "mesh"), thinned(itertools.product(MECHANISMS, SPLIT), 4)
)
def test_every_mesh_trains_the_same_parameters(mechanism, mesh):
    start, _, _, run = run_of(mechanism, ALONE)
    expected, found = run.params(), run_of(mechanism, mesh)[-1].params()
    moved = norm(jax.tree.map(np.subtract, expected, start))
    assert moved > 0.1
    # Sums that are rounded otherwise may be released as neighbours on the noise's grid.
    assert_close(found, expected, rtol=1e-4, scale=moved)


@pytest.mark.parametrize("engine", ["vmap", "ghost", "bookkeeping"])
@pytest.mark.parametrize("mesh", SPLIT)
def test_a_step_reduces_over_replicas_once_and_moves_no_examples(mesh, engine):
    run = Run(mesh, **{"compute.physical_batch_size": 48, "compute.engine": engine})
    phase, state = "gradient", run.state
    sums = run.step.begin(phase, state)
    chunk = run.step.place(next(run.batches()).chunks[0])

    def moved(function, *args):
        text = function.lower(*args).compile().as_text()
        return [c for c in collectives(text) if max(map(math.prod, c.shapes)) > 1]

    assert moved(run.step.begin, phase, state) == []
    # However many chunks a step has, replicas do not meet. Within one, weights travel to
    # where they are used, and their sums to where they are kept; of rows, one number each.
    inside = moved(run.step.accumulate, phase, state, sums, chunk)
    rows = {48 // mesh[0], 48 // mesh[0] // mesh[1]}
    for one in inside:
        along = meets(one, run.layout)
        assert "data" not in along
        if "fsdp" in along:
            assert not [
                s for s in one.shapes if rows & {*s} and math.prod(s) > max(rows)
            ]
    assert bool(inside) == run.layout.split
    reduced = moved(run.step.finish, state, sums)
    between = [c for c in reduced if "data" in meets(c, run.layout)]
    assert {c.kind for c in between} <= {"all-reduce", "reduce-scatter"}
    shapes = [
        leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(state.params)
    ]
    found = sorted(shape for c in between for shape in c.shapes if math.prod(shape) > 1)
    assert found == (sorted(shapes) if mesh[0] > 1 else [])


def meets(collective, layout):
    """Along which axes of the mesh the devices of a collective differ."""
    places = {device.id: place for place, device in np.ndenumerate(layout.mesh.devices)}
    found = set()
    for group in collective.groups or [[*places]]:
        axes = np.array([places[i] for i in group])
        differ = (axes != axes[0]).any(axis=0)
        found |= {name for name, yes in zip(AXES, differ, strict=True) if yes}
    return found


def test_microbatches_are_of_so_many_rows_on_each_device():
    run = Run((2, 4, 1), **{"compute.microbatch_size": 2, "compute.engine": "auto"})
    sums = run.step.begin("gradient", run.state)
    chunk = run.step.place(next(run.batches()).chunks[0])
    text = run.step.accumulate.lower("gradient", run.state, sums, chunk).as_text()
    # 64 rows: 8 on each device, in 4 microbatches of 8 rows of a replica.
    assert "tensor<4x8x8x8x1xf32>" in text
    alone = Run(ALONE)
    whole, _ = alone.step.accumulate(
        "gradient",
        alone.state,
        alone.step.begin("gradient", alone.state),
        next(alone.batches()).chunks[0],
    )
    found, _ = run.step.accumulate("gradient", run.state, sums, chunk)
    total = whole.merged().total
    # Fast norms allow for rounding, and clip a little further.
    assert_close(found.merged().total, total, rtol=1e-4, scale=norm(total))


def test_each_device_draws_noise_for_its_own_part_only():
    run = run_of("DP-SGD", (2, 4, 1))[-1]
    sums = run.step.begin("gradient", run.state)
    text = run.step.finish.lower(run.state, sums).compile().as_text()
    assert "u32[16,10]" in text  # random bits of a quarter of the kernel
    assert "u32[64,10]" not in text


def test_moments_and_averages_are_split_like_their_parameters():
    layout = layout_of((2, 4, 1), (("kernel", 1), (".*", None)))
    params = {"a": {"kernel": jnp.ones((3, 8)), "bias": jnp.ones(8)}}
    state = {
        "adam": optax.adam(0.1).init(params),
        "average": params,
        "row": {"a": {"kernel": jnp.ones(3)}},  # a factored moment: of another shape
        "recent": {"a": {"kernel": jnp.ones((2, 3, 8)), "bias": jnp.ones((2, 8))}},
        "key": root_key(0),
    }
    placed = layout.put(state, params)
    split = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(placed)
        if not leaf.sharding.is_fully_replicated
    }
    assert split == {
        "['adam'][0].mu['a']['kernel']",
        "['adam'][0].nu['a']['kernel']",
        "['average']['a']['kernel']",
        "['recent']['a']['kernel']",
    }
    recent = placed["recent"]["a"]
    assert recent["kernel"].sharding.spec == PartitionSpec(None, None, "fsdp")
    assert recent["bias"].sharding == layout.whole
    assert placed["average"]["a"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp")


def test_a_single_array_is_split_and_what_ends_like_it_is_not():
    layout = layout_of((1, 4, 1), (("params", 0),))
    state = {"params": jnp.ones(4), "seed": jnp.ones(4, jnp.uint32), "key": root_key(0)}
    placed = layout.put(state, jnp.ones(4))
    assert placed["params"].sharding.spec == PartitionSpec("fsdp")
    assert placed["seed"].sharding == layout.whole


# --- Bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"data": 16}, "data=16 x fsdp=1 x model=1 needs 16 devices, and there are 8"),
        ({"fsdp": 3}, "fsdp=3 x model=1 does not divide the 8 devices"),
        ({"model": 2}, "model=2 needs rules that say what is split over it"),
    ],
)
def test_a_mesh_that_does_not_match_the_devices_is_refused(mesh, message):
    with pytest.raises(ValueError, match=message):
        make_layout(**{"data": None, "fsdp": 1, "model": 1} | mesh, rules=LARGEST)


def test_processes_with_different_numbers_of_devices_are_refused(monkeypatch):
    found = [types.SimpleNamespace(process_index=i) for i in (0, 1, 1, 1)]
    monkeypatch.setattr(jax, "devices", lambda: found)
    with pytest.raises(
        ValueError, match="processes have 1, 3 devices; give each as many"
    ):
        make_layout(data=None, fsdp=1, model=1, rules=LARGEST)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("kernel", 0),), "no rule is for the parameter 'head/bias'"),
        ((("bias", 1), (".*", None)), r"cannot split the parameter 'head/bias'"),
        ((("bias", 0),), r"of shape \(10,\) over fsdp=4; use another dimension"),
        ((("bias", -2),), "use another dimension"),
        ((("bias", None, 0), (".*", 1, 1)), "over fsdp and model; choose two"),
        ((("bias", None, 1), (".*", None, 0)), "over model=2; use another dimension"),
    ],
)
def test_rules_that_do_not_fit_the_parameters_are_refused(rules, message):
    params = {"head": {"bias": jnp.ones(10), "kernel": jnp.ones((4, 8))}}
    mesh = (1, 4, 2) if any(len(rule) == 3 for rule in rules) else (2, 4, 1)
    with pytest.raises(ValueError, match=message):
        layout_of(mesh, rules).of_params(params)


def test_rows_that_cannot_be_spread_evenly_are_refused():
    with pytest.raises(ValueError, match="physical_batch_size=60 must be divisible by"):
        check_rows(60, devices=8, microbatch_size=None)
    with pytest.raises(ValueError, match="/ 8 devices = 8 rows of each"):
        check_rows(64, devices=8, microbatch_size=3)


# --- Rules that ship ----------------------------------------------------------------------

SIZES = {"layers": 2, "width": 16, "heads": 4, "dtype": "float32", "remat": True}
FAMILIES = {
    "gpt2": lambda scan: gpt2(vocab_size=51, length=8, scan=scan, **SIZES),
    "llama": lambda scan: llama(
        **SIZES | {"vocab_size": 64, "length": 8, "kv_heads": 2, "hidden": 32},
        rotary_base=1e4,
        epsilon=1e-5,
        tied=False,
        scan=scan,
    ),
}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_rules_of_transformers_split_whatever_is_large(family, scan):
    rules = {"gpt2": TRANSFORMER, "llama": VOCABULARY}[family]
    example = {"tokens": np.zeros(8, np.int32)}
    shapes = jax.eval_shape(FAMILIES[family](scan).init, KEY, example)
    where = layout_of((1, 2, 2), rules).of_params(shapes)
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(where), strict=True
    ):
        name, part = name_of(path), math.prod(sharding.shard_shape(leaf.shape))
        split = {axis for axis in sharding.spec if axis}
        over = {"fsdp"} if re.search("token|position", name) else {"fsdp", "model"}
        if family == "llama" and "token" in name:
            over = {"fsdp", "model"}
        if "kernel" in name or re.search("token|position", name):
            assert split == over, name
            assert part == leaf.size // 2 ** len(over)
        # The axis of layers is that of the loop over them.
        assert not (scan and name.startswith("layers") and sharding.spec[:1] != ()) or (
            sharding.spec[0] is None
        )


def test_a_vocabulary_that_cannot_be_split_is_named():
    example = {"tokens": np.zeros(8, np.int32)}
    shapes = jax.eval_shape(FAMILIES["gpt2"](True).init, KEY, example)
    with pytest.raises(
        ValueError, match=r"'token/embedding' of shape \(51, 16\) over mod"
    ):
        layout_of((1, 2, 2), VOCABULARY).of_params(shapes)


# --- Tensor parallelism ---------------------------------------------------------------------


def columns_and_rows(params, example, key):
    """A product that is divided by its outputs, and one by its inputs."""
    hidden = jnp.tanh(example["x"] @ params["up"])
    return jnp.sum(jnp.square(hidden @ params["down"]))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("engine", ["bookkeeping", "ghost"])
def test_norms_of_divided_weights_cost_one_number_of_each_example(engine, scan):
    rng = np.random.default_rng(0)
    lead = (3,) if scan else ()
    params = {
        "up": jnp.asarray(rng.normal(size=(*lead, 6, 16)), jnp.float32),
        "down": jnp.asarray(rng.normal(size=(*lead, 16, 6)), jnp.float32),
    }
    batch = batch_of({"x": rng.normal(size=(8, 5, 6)).astype(np.float32)})

    def loss(params, example, key):
        if not scan:
            return columns_and_rows(params, example, key)

        @jax.checkpoint
        def layer(x, weights):
            return x + jnp.tanh(x @ weights["up"]) @ weights["down"], None

        return jnp.sum(jnp.square(jax.lax.scan(layer, example["x"], params)[0]))

    rules = (("up", None, -1), ("down", None, -2))
    layout = layout_of((2, 1, 4), rules)
    query = Query((params,), clip_norm=0.1)

    def add(query, batch):
        total, statistics = ENGINES[engine](layout.gathering(loss), query, batch, KEY)
        return total.stacked(1), statistics

    placed = dataclasses.replace(query, points=(layout.put(params, params),))
    program = jax.jit(layout.on_each(add))
    lowered = program.lower(placed, layout.place(batch, 8)).compile()
    sums, statistics = lowered(placed, layout.place(batch, 8))
    total, _, _, norms = reference(loss, query, batch, KEY)
    assert_close(sums.merged().total, total, rtol=1e-5, scale=norm(total))
    np.testing.assert_allclose(reveal(statistics)["norms"], norms, rtol=1e-4)
    # Activations travel, [4, 5, 6] of a replica, as in any training; no Gram matrix does.
    # (Of stacked factors, which are seen for all layers at once, they do.)
    moved = {s for c in collectives(lowered.as_text()) for s in c.shapes}
    grams = {s for s in moved if s[-2:] == (5, 5)}
    assert not grams or (scan and engine == "bookkeeping")
    assert any(s[-2:] == (5, 6) for s in moved)


def test_norms_of_rows_on_several_devices_are_never_too_small():
    """Small entries that are lost beside large ones: norms have to allow for them."""
    rows = np.full((8, 40, 3000), 2e-4, np.float32)
    rows[:, :, ::1500] = 1.0
    layout = layout_of((1, 2, 2), BOTH)

    def measured(_, rows):
        return row_norms(jax.lax.with_sharding_constraint(rows, SPLIT_ROWS))

    found = jax.jit(layout.on_each(measured))((), rows)
    true = np.square(rows.astype(np.float64)).sum(axis=(1, 2))
    squares = np.asarray(found.squares, np.float64)
    assert (squares != true).any()
    assert (squares + found.slack >= true).all()
    assert (np.abs(squares - true) <= found.slack).all()


SPLIT_ROWS = PartitionSpec("fsdp", None, "model")


def test_weights_travel_in_the_dtype_of_the_computation():
    model = FAMILIES["gpt2"](True)
    low = gpt2(vocab_size=51, length=8, scan=True, **SIZES | {"dtype": "bfloat16"})
    example = {"tokens": np.zeros(8, np.int32)}
    params = jax.eval_shape(model.init, KEY, example)
    layout = layout_of((1, 8, 1), TRANSFORMER)

    def moved(model):
        def loss(params, rows):
            logits = jax.vmap(lambda t: model.apply(params, {"tokens": t}, KEY))(rows)
            return jnp.sum(logits.astype(jnp.float32))[None]

        text = (
            jax.jit(layout.on_each(layout.gathering(loss)))
            .lower(params, np.zeros((8, 8), np.int32))
            .as_text()
        )
        whole = r"sharding_constraint .* \[{}, {}\]> : tensor<16x64x(\w+)>"
        return {*re.findall(whole, text)}

    assert moved(model) == {"f32"}
    assert moved(low) == {"bf16"}


@pytest.mark.parametrize("penalty", [0.0, 0.01])
@pytest.mark.parametrize("engine", ["auto", "ghost"])
def test_a_tied_table_may_be_split_by_vocabulary(engine, penalty):
    """Its cross terms look up columns along the split axis."""
    model = gpt2(vocab_size=32, length=8, scan=True, **SIZES)
    batch = batch_of(
        {"tokens": np.random.default_rng(0).integers(0, 32, (8, 8)).astype(np.int32)}
    )
    params = model.init(KEY, {"tokens": batch.examples["tokens"][0]})

    def loss(params, example, key):
        table = params["token"]["embedding"]
        return causal_lm(model)(params, example, key) + penalty * jnp.sum(table**2)

    layout, query = layout_of((2, 2, 2), VOCABULARY), Query((params,), clip_norm=0.1)

    def add(query, batch):
        total, _ = ENGINES[engine](layout.gathering(loss), query, batch, KEY)
        return total.stacked(1)

    placed = Query((layout.put(params, params),), clip_norm=0.1)
    sums = jax.jit(layout.on_each(add))(placed, layout.place(batch, 8))
    total = reference(loss, query, batch, KEY)[0]
    assert_close(sums.merged().total, total, rtol=2e-5, scale=norm(total))
