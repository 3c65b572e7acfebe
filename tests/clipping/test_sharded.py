"""With the example axis sharded, nothing that has one travels between devices."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpjax.clipping import Query, auto, bookkeeping, ghost, microbatched, vmap
from tests.checks import assert_close, batch_of, norm
from tests.clipping.planning.test_planner import transformer
from tests.contracts.test_engines import CASES

KEY = jax.random.key(0)
ENGINES = {
    "vmap": vmap,
    "bookkeeping": bookkeeping,
    "ghost": ghost,
    "auto": auto,
    "microbatched(bookkeeping, 8)": microbatched(bookkeeping, size=8),
}
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def twice(tree):
    return jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), tree)


LOSSES = {
    "transformer": transformer(width=12, positions=5, layers=2, vocabulary=9),
    "convolution": (*CASES["convolution"][:2], twice(CASES["convolution"][2])),
}


# The reference does gather: XLA splits its convolutions by example, across devices.
@pytest.mark.parametrize(
    ("name", "engine"),
    [
        pytest.param(
            name,
            engine,
            marks=[] if engine in ("bookkeeping", "auto") else pytest.mark.long,
        )
        for name in LOSSES
        for engine in ENGINES
        if (name, engine) != ("convolution", "vmap")
    ],
)
def test_only_sums_and_counts_are_reduced(engine, name):
    loss, params, examples = LOSSES[name]
    engine = ENGINES[engine]
    batch = batch_of(examples)
    devices = Mesh(np.array(jax.devices()[:4]), ("data",))
    by_example = NamedSharding(devices, PartitionSpec("data"))
    everywhere = NamedSharding(devices, PartitionSpec())

    def run(params, batch):
        return engine(loss, Query((params,), clip_norm=0.5), batch, KEY)

    sharded = jax.jit(run, in_shardings=(everywhere, by_example))
    program = sharded.lower(params, batch).compile()
    moved = COLLECTIVE.findall(program.as_text())
    assert moved, "the sum over devices needs a collective"
    # A loop over layers may reduce one layer at a time.
    sizes = {
        leaf.size // n for leaf in jax.tree.leaves(params) for n in (1, *leaf.shape[:1])
    }
    for shapes, kind in moved:
        assert kind in ("all-reduce", "reduce-scatter"), (kind, shapes)
        for dimensions in re.findall(r"\w+\[([\d,]*)\]", shapes):
            size = int(np.prod([int(d) for d in dimensions.split(",") if d] or [1]))
            # Sums like parameters, or scalars; [16, ...] or [4, ...] would be examples.
            assert size in sizes | {1}, (kind, shapes)
    total, _ = program(params, batch)
    alone, _ = jax.jit(run)(params, batch)
    assert_close(total.total, alone.total, rtol=1e-5, scale=norm(alone.total))
