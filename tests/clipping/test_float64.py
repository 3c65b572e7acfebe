"""In float64 the engines agree to ten digits: the rules are exact, not approximate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.clipping import Query, bookkeeping, ghost, vmap
from dpjax.privacy.sensitive import reveal
from tests.checks import batch_of, norm, thinned
from tests.contracts.zoo import ZOO

NAMES = [
    "conv_transpose_of_lax_with_flipped_kernel",
    "dense_general_two_outputs",
    "embedding_by_pairs_of_ids_out_of_bounds",
    "embedding_ids_repeat",
    "fused_queries_keys_and_values",
    "gru",
    "lstm_with_concatenated_kernels",
    "network_of_a_flat_vector",
    "scan_in_scan_layers_inside_time",
    "scan_over_layers_with_one_used_outside",
    "slices_that_overlap_in_other_shapes",
    "tied_head",
    "two_uses_that_cancel",
    "weights_times_numbers",
]


def wide(tree):
    def cast(leaf):
        leaf = np.asarray(leaf)
        return leaf.astype(np.float64) if leaf.dtype == np.float32 else leaf

    return jax.tree.map(cast, tree)


@pytest.mark.parametrize(
    ("engine", "name"),
    thinned([(engine, name) for engine in (bookkeeping, ghost) for name in NAMES], 3),
)
def test_engine_equals_per_example_gradients_to_ten_digits(engine, name):
    with jax.enable_x64(True):
        case = ZOO[name]()
        params, batch = wide(case.params), batch_of(wide(case.examples))
        query = Query((params,), clip_norm=0.1, residual=True)
        run = jax.jit(lambda engine, *a: engine(case.loss, *a), static_argnums=0)
        key = jax.random.key(0)
        found, statistics = run(engine, query, batch, key)
        expected, wanted = run(vmap, query, batch, key)
        for part in ("total", "residual"):
            actual, exact = getattr(found, part), getattr(expected, part)
            difference = norm(jax.tree.map(jnp.subtract, actual, exact))
            assert jax.tree.leaves(actual)[0].dtype == jnp.float64
            assert difference <= 1e-10 * (norm(exact) + 0.1)
        norms, exact_norms = reveal(statistics)["norms"], reveal(wanted)["norms"]
        np.testing.assert_allclose(norms, exact_norms, rtol=1e-10)
