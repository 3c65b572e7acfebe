"""Thousands of runs of a mechanism as one program: what an attacker reads of them.

Everything but the data is what ships: clipped sums from an engine asked
``mechanism.query``, releases from ``mechanism.release`` with keys of its own for every
run. There is one parameter x and the loss of an example is ``g x^2 / 2``, so its
gradient ``g x`` can be as long as an attack likes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from dpjax.clipping import Engine, vmap
from dpjax.mechanisms import Mechanism
from dpjax.mechanisms.adversary.views import View, view
from dpjax.typing import Batch, Example, Key, Params


class Draws(NamedTuple):
    """Which rows take part: ``bool[n, T, N]``; row 0 is the target."""

    inside: NDArray[np.bool_]
    outside: NDArray[np.bool_]


def silence(
    mechanism: Mechanism, *, trials: int, steps: int, seed: int
) -> NDArray[np.float64]:
    """Return what the attacker reads, ``[trials, steps]``, if nobody has a gradient.

    N(0, 1) throughout if the noise is what is accounted.
    """
    nobody = np.zeros((trials, steps, 1), bool)
    draws = Draws(nobody, nobody[:0])
    seen = observe(mechanism, view(mechanism), draws, seed=seed, engine=vmap)
    return seen[0]


def observe(
    mechanism: Mechanism, known: View, draws: Draws, *, seed: int, engine: Engine
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what the attacker reads, ``[n, T]``, with and without the target."""
    trials, (steps, rows) = len(draws.inside), draws.inside.shape[1:]
    masks = np.concatenate([draws.inside, draws.outside])
    gradients = np.full(rows, -known.gradient / 2, np.float32)
    gradients[0] = known.gradient
    runs = len(masks)
    words = jax.random.bits(jax.random.key(seed), (runs, 2, 2), jnp.uint32)
    keys = jax.random.wrap_key_data(words, impl="threefry2x32")
    run = _runner(mechanism, engine)
    point = {"x": jnp.float32(known.path(0))}
    state = known.start(mechanism.init(point))
    state = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (runs, *leaf.shape)), state
    )
    seen = np.empty((runs, steps))
    for step in range(steps):
        point = {"x": jnp.float32(known.path(step))}
        state, y = run(
            mechanism.phase(step), point, state, masks[:, step], gradients, keys, step
        )
        seen[:, step] = y
    seen = known.whiten(seen)
    return seen[:trials], seen[trials:]


@functools.lru_cache(maxsize=4)
def _runner(mechanism: Mechanism, engine: Engine) -> Any:
    """Compile one step of all runs; once for each phase and all attacks alike."""
    read = view(mechanism).read

    @functools.partial(jax.jit, static_argnums=0)
    def run(
        phase: str,
        point: Params,
        states: Any,
        masks: Array,
        gradients: Array,
        keys: Key,
        step: Array,
    ) -> tuple[Any, Array]:
        def one(state: Any, mask: Array, key: Key) -> tuple[Any, Array]:
            query = mechanism.query(phase, point, state)
            batch = Batch({"g": gradients}, mask, jnp.arange(len(gradients)))
            clipped, _ = engine(_loss, query, batch, jax.random.key(0))
            mean, after = mechanism.release(clipped, state, point, key=key, step=step)
            return after, read(phase, mean, state, after)

        return jax.vmap(one)(states, masks, keys)

    return run


def _loss(params: Params, example: Example, key: Key) -> Array:
    del key
    return example["g"] * jnp.square(params["x"]) / 2
