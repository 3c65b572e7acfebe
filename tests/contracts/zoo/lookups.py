"""Embeddings: rows of a table picked in all ways."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.contracts.zoo.cases import (
    bits,
    case,
    dense,
    derived,
    embedding,
    embedding_and_number,
    entropy,
    fallback,
    frozen,
    ids,
    score,
    tied,
    x,
)


@case({"table": embedding(7, 3)}, {"ids": ids(7, 5)})
def embedding_lookup(p, e, key):
    return score(p["table"][e["ids"]])


@case({"table": embedding(4, 4)}, {"ids": ids(4, 4), "x": x(4, 4)})
def embedding_lookup_all_equal(p, e, key):
    return score(p["table"][e["ids"]] * e["x"])


@case({"table": embedding(2, 3)}, {"ids": ids(2, 6), "x": x(6, 3)})
def embedding_ids_repeat(p, e, key):
    return score(p["table"][e["ids"]] * e["x"])


@case({"table": embedding(7, 3)}, {"ids": ids(7)})
def embedding_of_one_scalar_id(p, e, key):
    return score(jnp.take(p["table"], e["ids"], axis=0))


@case({"table": embedding(7, 3)}, {"ids": ids(7, 2, 3)})
def embedding_of_a_grid_of_ids(p, e, key):
    return score(jnp.sum(p["table"][e["ids"]], axis=0))


@case({"table": frozen(7, 3), "w": dense(3, 2)}, {"ids": ids(7, 0), "x": x(3)})
def embedding_of_no_ids(p, e, key):
    return score(
        jnp.sum(p["table"][e["ids"]], axis=0)
        + e["x"] @ p["w"] @ np.ones((2, 3), np.float32)
    )


@case({"table": embedding(7, 2, 3)}, {"ids": ids(7, 5)})
def embedding_of_matrices(p, e, key):
    return score(p["table"][e["ids"]])


@case({"table": embedding(7)}, {"ids": ids(7, 5)})
def embedding_of_scalars(p, e, key):
    return score(p["table"][e["ids"]] ** 2)


@case({"table": embedding(7, 3)}, {"ids": ids(12, 6, low=-5)})
def embedding_clips_ids_out_of_range(p, e, key):
    return score(jnp.take(p["table"], e["ids"], axis=0, mode="clip"))


@case({"table": embedding(7, 3)}, {"ids": ids(12, 6, low=-12)})
def embedding_fills_ids_out_of_range(p, e, key):
    rows = jnp.take(p["table"], e["ids"], axis=0, mode="fill", fill_value=0.5)
    return score(rows)


@case({"table": embedding(7, 3)}, {"ids": ids(7, 6, low=-7)})
def embedding_negative_ids(p, e, key):
    return score(p["table"][e["ids"]])


@case({"table": embedding(7, 3)}, {"ids": ids(7, 6)})
def embedding_promises_ids_in_range(p, e, key):
    return score(p["table"].at[e["ids"]].get(mode="promise_in_bounds"))


@case({"table": embedding(7, 3)}, {"ids": x(5, low=0, high=7, dtype=jnp.uint8)})
def embedding_of_byte_ids(p, e, key):
    return score(p["table"][e["ids"]])


@case({"table": dense(7, 3)}, {"ids": ids(9, 5)})
def embedding_by_one_hot(p, e, key):
    return score(jax.nn.one_hot(e["ids"], 7) @ p["table"])


@case({"table": embedding(3, 7)}, {"ids": ids(7, 5)})
def embedding_of_a_transposed_table(p, e, key):
    return score(p["table"].T[e["ids"]])


@case({"table": embedding(3, 7)}, {"ids": ids(7, 5)})
def embedding_of_columns(p, e, key):
    return score(jnp.take(p["table"], e["ids"], axis=1))


@case({"table": embedding(14, 3)}, {"ids": ids(7, 5)})
def embedding_of_a_reshaped_table(p, e, key):
    return score(p["table"].reshape(7, 6)[e["ids"]])


@case({"table": embedding(9, 4)}, {"ids": ids(5, 6)})
def embedding_of_a_slice_of_the_table(p, e, key):
    return score(p["table"][2:7, 1:][e["ids"]])


@case({"table": tied(9, 3)}, {"a": ids(6, 5), "b": ids(6, 4)})
def embedding_of_slices_that_overlap(p, e, key):
    return score(p["table"][:6][e["a"]]) + score(p["table"][3:][e["b"]])


@case({"table": embedding(4, 5, 3)}, {"i": ids(4, 6), "j": ids(5, 6)})
def embedding_by_pairs_of_ids(p, e, key):
    return score(p["table"][e["i"], e["j"]])


@case({"table": fallback(7, 4)}, {"ids": ids(7, 5)})
def embedding_of_half_rows(p, e, key):
    return score(p["table"][e["ids"], 1:3])


@case({"table": embedding(5, 4)}, {"ids": ids(4, 5, 1)})
def take_along_axis_of_a_parameter(p, e, key):
    return score(jnp.take_along_axis(p["table"], e["ids"], axis=1))


@case({"table": embedding(7, 3)}, {"i": ids(7)})
def row_by_traced_index(p, e, key):
    return score(p["table"][e["i"]])


@case({"table": fallback(7, 3)}, {"i": ids(7)})
def several_rows_by_dynamic_slice(p, e, key):
    return score(jax.lax.dynamic_slice(p["table"], (e["i"], 0), (3, 3)))


@case({"table": embedding(3, 7)}, {"i": ids(7)})
def column_by_traced_index(p, e, key):
    return score(p["table"][:, e["i"]])


@case({"table": embedding(2, 5, 3)}, {"ids": ids(5, 2, 4)})
def vmap_of_lookups_in_a_stack_of_tables(p, e, key):
    return score(jax.vmap(lambda t, i: t[i])(p["table"], e["ids"]))


@case({"table": tied(7, 3)}, {"a": ids(7, 5), "b": ids(7, 4)})
def embedding_used_twice(p, e, key):
    one, two = p["table"][e["a"]], p["table"][e["b"]]
    return score(jax.nn.softmax(one @ two.T) @ two)


@case({"table": tied(7, 3)}, {"ids": ids(7, 5)})
def tied_head(p, e, key):
    hidden = jnp.tanh(p["table"][e["ids"]])
    return entropy(hidden @ p["table"].T, e["ids"])


@case({"table": tied(4, 4)}, {"ids": ids(4, 4)})
def tied_head_all_equal(p, e, key):
    hidden = jnp.tanh(p["table"][e["ids"]])
    return entropy(hidden @ p["table"].T, e["ids"])


@case({"table": tied(7, 3), "w": dense(3, 3)}, {"ids": ids(10, 6, low=-9)})
def tied_head_with_ids_out_of_range(p, e, key):
    rows = jnp.take(p["table"], e["ids"], axis=0, mode="fill", fill_value=0.0)
    return score(jnp.tanh(rows @ p["w"]) @ p["table"].T)


@case({"table": tied(7, 3)}, {"ids": ids(7, 5), "i": ids(7)})
def embedding_head_and_one_hot_of_one_table(p, e, key):
    hidden = p["table"][e["ids"]] + (jax.nn.one_hot(e["i"], 7) @ p["table"])[None]
    return score(hidden @ p["table"].T + p["table"][e["i"]][0])


@case({"table": embedding_and_number(7, 3)}, {"ids": ids(7, 5)})
def embedding_with_a_penalty_on_the_table(p, e, key):
    return score(p["table"][e["ids"]]) + 0.1 * jnp.sum(jnp.square(p["table"]))


@case({"table": derived(7, 3)}, {"ids": ids(7, 5)})
def embedding_of_a_normalised_table(p, e, key):
    size = jnp.sqrt(jnp.sum(jnp.square(p["table"]), axis=1, keepdims=True))
    return score((p["table"] / size)[e["ids"]])


@case({"table": embedding(7, 3), "w": dense(3, 2)}, {"ids": ids(7, 5), "m": bits(5)})
def padding_tokens_are_masked(p, e, key):
    logits = p["table"][e["ids"]] @ p["w"]
    losses = jnp.sum(jnp.sin(logits), axis=-1)
    return jnp.sum(jnp.where(e["m"], losses, 0)) / (1 + jnp.sum(e["m"]))


@case({"w": dense(3, 4)}, {"x": x(5, 3), "y": ids(4, 5), "weight": x(5)})
def tokens_are_weighted(p, e, key):
    log = jax.nn.log_softmax(e["x"] @ p["w"])
    picked = jnp.take_along_axis(log, e["y"][:, None], axis=-1)[:, 0]
    return -jnp.sum(picked * e["weight"])


# --- Rows picked in all ways ---------------------------------------------------------------


@case({"table": embedding(7, 3)}, {"ids": ids(7, 5)})
def vmap_of_a_scalar_lookup(p, e, key):
    return score(jax.vmap(lambda i: p["table"][i])(e["ids"]))


@case({"table": tied(7, 3)}, {"ids": ids(7, 5), "i": ids(7)})
def scalar_lookups_and_head_of_one_table(p, e, key):
    hidden = jax.vmap(lambda i: p["table"][i])(e["ids"]) + p["table"][e["i"]][None]
    return score(jnp.tanh(hidden) @ p["table"].T)


@case({"table": embedding(7, 3)}, {"i": ids(30, low=-15)})
def row_by_an_index_out_of_bounds(p, e, key):
    return score(jax.lax.dynamic_index_in_dim(p["table"], e["i"], axis=0))


@case({"table": embedding(4, 5, 3)}, {"i": ids(4), "j": ids(9, low=-9)})
def row_by_two_traced_indices(p, e, key):
    return score(p["table"][e["i"], e["j"]])


@case({"table": embedding(4, 2, 5)}, {"i": ids(4, 6), "j": ids(5, 6)})
def rows_across_the_middle_of_a_table(p, e, key):
    return score(p["table"][e["i"], :, e["j"]])


@case({"table": tied(4, 5, 3)}, {"i": ids(9, 6, low=-9), "j": ids(9, 6, low=-9)})
def embedding_by_pairs_of_ids_out_of_bounds(p, e, key):
    found = p["table"].at[e["i"], e["j"]].get(mode="fill", fill_value=0.5)
    return score(found) + score(p["table"].at[e["j"], e["i"]].get(mode="clip"))


@case({"table": embedding(3, 3, 3)}, {"i": ids(3, 3), "j": ids(3, 3)})
def embedding_by_pairs_of_ids_all_equal(p, e, key):
    return score(p["table"][e["i"], :, e["j"]] * jnp.arange(9.0).reshape(3, 3))


@case({"table": embedding(5, 4, 3)}, {"ids": ids(4, 6, 5)})
def lookups_per_head_with_heads_last(p, e, key):
    rows = jax.vmap(lambda t, i: t[i], in_axes=(0, 1), out_axes=1)
    return score(rows(p["table"], e["ids"]) * jnp.arange(90.0).reshape(6, 5, 3))


@case({"tables": embedding(2, 7, 3), "w": dense(3, 3)}, {"ids": ids(7, 2)})
def scan_over_scalar_lookups(p, e, key):
    def step(h, xs):
        table, i = xs
        return jnp.tanh(h @ p["w"] + table[i]), None

    return score(jax.lax.scan(step, jnp.ones(3), (p["tables"], e["ids"]))[0])


@case({"table": tied(7)}, {"ids": ids(7, 5), "i": ids(7)})
def numbers_by_id_and_by_traced_index(p, e, key):
    return score(p["table"][e["ids"]] * p["table"][e["i"]])
