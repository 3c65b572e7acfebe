"""The programs that the benchmark compares, and what their compilers say of them."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpjax.clipping import Query, resolve_engine
from dpjax.typing import Batch, Key, Loss, Params, Scalar
from experiments.benchmarks import flops

Program = Callable[[Params, Batch, Key, Scalar], Any]
"""``(params, batch, key, clip_norm)`` to a gradient, without privacy, which ignores the
last; or to a clipped sum and the norms before."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program made ready ahead of time.

    Attributes:
        run: Takes what the program takes.
        seconds: Wall time of tracing, lowering and compiling.
        lowered: What was compiled.
    """

    run: jax.stages.Compiled
    seconds: float
    lowered: jax.stages.Lowered

    @property
    def temp_bytes(self) -> int:
        """Memory beside arguments and results."""
        analysis: Any = self._analysed.memory_analysis()
        return analysis.temp_size_in_bytes

    @property
    def flops(self) -> float | None:
        """See ``experiments.benchmarks.flops.count``."""
        return flops.count(self._analysed.as_text() or "")

    @functools.cached_property
    def _analysed(self) -> jax.stages.Compiled:
        # The default scheduler of the CPU trades memory for concurrency, by up to 2.7
        # times, and may so reorder the programs. (The older boolean option for it is only
        # read from the environment: here it would change nothing.)
        if jax.default_backend() != "cpu":
            return self.run
        return self.lowered.compile(
            {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
        )


def mean_gradient(loss: Loss, *, microbatch_size: int | None = None) -> Program:
    """Return the gradient of the mean of the losses: what training wants."""

    def gradient(params: Params, batch: Batch, key: Key) -> Params:
        def mean_loss(params: Params) -> Scalar:
            losses = jax.vmap(loss, in_axes=(None, 0, 0))
            return losses(params, batch.examples, _keys(key, batch)).mean()

        return jax.grad(mean_loss)(params)

    return _nonprivate(gradient, microbatch_size=microbatch_size)


def mean_of_gradients(loss: Loss, *, microbatch_size: int | None = None) -> Program:
    """Return the mean of per-example gradients, which some shapes favour."""

    def gradient(params: Params, batch: Batch, key: Key) -> Params:
        gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))
        each = gradients(params, batch.examples, _keys(key, batch))
        return jax.tree.map(lambda g: g.mean(axis=0), each)

    return _nonprivate(gradient, microbatch_size=microbatch_size)


def private(loss: Loss, engine: str, *, microbatch_size: int | None = None) -> Program:
    """Return the clipped sum and the norms of an engine."""
    run = resolve_engine(engine, microbatch_size=microbatch_size)

    def program(
        params: Params, batch: Batch, key: Key, clip_norm: Scalar
    ) -> tuple[Params, Array]:
        query = Query((params,), clip_norm=clip_norm)
        clipped, statistics = run(loss, query, batch, key)
        return clipped.total, statistics.norms

    return program


def compiled(program: Program, arguments: tuple[Any, ...]) -> Compiled:
    """Compile for these arguments, arrays or shapes."""
    # Else what earlier programs traced of the same functions would be free.
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(program).trace(*arguments).lower()
    ready = lowered.compile()
    seconds = time.perf_counter() - start
    return Compiled(ready, seconds, lowered)


def relative_error(
    answer: tuple[Params, Array], reference: tuple[Params, Array]
) -> float:
    """Return the larger of two errors: of the sum in L2, of the norms the greatest."""
    (total, norms), (true_total, true_norms) = answer, reference
    difference = jax.tree.map(jnp.subtract, total, true_total)
    of_sum = _norm(difference) / _norm(true_total)
    of_norms = jnp.max(jnp.abs(norms - true_norms) / true_norms)
    return float(jnp.maximum(of_sum, of_norms))


def _nonprivate(
    gradient: Callable[[Params, Batch, Key], Params], *, microbatch_size: int | None
) -> Program:
    def program(params: Params, batch: Batch, key: Key, clip_norm: Scalar) -> Params:
        del clip_norm
        if microbatch_size is None:
            return gradient(params, batch, key)
        slices = jax.tree.map(
            lambda x: x.reshape(-1, microbatch_size, *x.shape[1:]), batch
        )

        def body(total: Params, part: Batch) -> tuple[Params, None]:
            return jax.tree.map(jnp.add, total, gradient(params, part, key)), None

        total, _ = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), slices)
        count = batch.mask.shape[0] // microbatch_size
        return jax.tree.map(lambda x: x / count, total)

    return program


def _keys(key: Key, batch: Batch) -> Key:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, batch.index)


def _norm(tree: Params) -> Array:
    leaves = jax.tree.leaves(tree)
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in leaves))
