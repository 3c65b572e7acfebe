"""The front door: a function transformation in JAX's style, usable on its own."""

import dataclasses
import difflib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.checks import (
    ENGINE_NAMES,
    ClipStyle,
    check_bool,
    check_clip,
    check_number,
    check_outer_norm,
)
from dpjax.clipping.analysis.tracing import below_float32, check_key, one_example, trace
from dpjax.clipping.engines.auto import auto, planned
from dpjax.clipping.engines.bookkeeping import bookkeeping
from dpjax.clipping.engines.ghost import ghost
from dpjax.clipping.engines.microbatched import microbatched
from dpjax.clipping.engines.vmap import vmap
from dpjax.clipping.query import Query
from dpjax.clipping.types import Engine
from dpjax.privacy.sensitive import ClippedSum, PerExample
from dpjax.typing import Batch, Key, Loss, Params

ENGINES: dict[str, Engine] = {
    "auto": auto,
    "bookkeeping": bookkeeping,
    "ghost": ghost,
    "vmap": vmap,
}
assert tuple(ENGINES) == ENGINE_NAMES


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippedGrad:
    """What ``clipped_grad`` returns: call it on (params, batch, key)."""

    loss: Loss
    clip_norm: float
    style: ClipStyle
    residual: bool
    outer_norm: float
    engine: Engine
    verify: bool

    def __call__(
        self, params: Params, batch: Batch | Any, key: Key
    ) -> tuple[ClippedSum, PerExample]:
        """Return the clipped gradient sum and private per-example statistics.

        Args:
            params: Pytree of floating-point arrays.
            batch: A ``Batch``, or a pytree of examples ``[B, ...]`` that all count.
            key: Randomness of the loss (dropout, augmentation), another one at each step;
                not the noise key. An example's own key follows from it and from what the
                example is, so it may be known to all (see ``dpjax.clipping.execution.keys``).
        """
        batch = _as_batch(batch)
        check_key(key)
        leaves = jax.tree.leaves(params)
        if not leaves or any(isinstance(leaf, str) for leaf in leaves):
            raise ValueError("params must be a tree of arrays, and have one at least")
        query = Query(
            (jax.tree.map(jnp.asarray, params),),
            clip_norm=self.clip_norm,
            style=self.style,
            residual=self.residual,
            outer_norm=self.outer_norm,
        )
        if self.verify:
            _verify(self.engine, self.loss, query, batch, key)
        return self.engine(self.loss, query, batch, key)

    def sensitivity(self) -> float:
        """Return the L2 distance between the sums of add/remove-one neighbours."""
        return self.clip_norm


def clipped_grad(
    loss: Loss,
    *,
    clip_norm: float,
    style: ClipStyle = "flat",
    residual: bool = False,
    outer_norm: float = math.inf,
    engine: str | Engine = "auto",
    microbatch_size: int | None = None,
    memory_budget: float | None = None,
    verify: bool = False,
) -> ClippedGrad:
    """Transform the loss of ONE example into a clipped gradient sum over many.

    The result has sensitivity ``clip_norm`` under add/remove-one: it is a *sum*; add noise
    to it (``dpjax.private`` does) before anything else, and divide by public constants
    only.

    Args:
        loss: ``(params, example, key) -> scalar``; there is no batch axis to mix.
        clip_norm: Bound on each example's contribution.
        style: See ``dpjax.clipping.Query``.
        residual: Also sum what clipping cut off (for error feedback).
        outer_norm: Clip each gradient to this norm first, so that with "flat" no residual
            is longer than ``outer_norm - clip_norm``.
        engine: Name or function; all engines compute the same. "vmap": per-example
            gradients, the reference. "bookkeeping": one backward pass, from which norms and
            sum follow without them. "ghost": two backward passes, the least memory.
            "auto": whatever is estimated to be fastest for this loss on this device.
        microbatch_size: Examples at once; None for the whole batch, or as many as "auto"
            thinks best.
        memory_budget: Bytes of temporaries that "auto" may plan for; None for half of the
            device's memory (see ``planned``).
        verify: Compare the engine's norms of the first two examples with those of "vmap"
            whenever the result is called, outside of ``jit``, before it answers.

    Raises:
        ValueError: A loss that is no function, a clip norm that is not positive and finite,
            an outer norm below it, an unknown style or engine, a microbatch size below 1,
            a budget for another engine than "auto"; at the call, norms that ``verify``
            finds wrong, or params or a batch without arrays of numbers, or with arrays
            that are not of as many examples.
        TypeError: At trace time: the loss is not a pure function to one floating-point
            scalar, a parameter is not floating point, a mask is not bool, a key is not a
            typed one, or ``verify`` is asked under ``jit``.

    Example:
        >>> import jax, jax.numpy as jnp, dpjax
        >>> def loss(params, example, key):
        ...     return jnp.square(params @ example["x"] - example["y"])
        >>> grad = dpjax.clipped_grad(loss, clip_norm=1.0)
        >>> batch = {"x": jnp.ones((4, 3)), "y": jnp.arange(4.0)}
        >>> total, private = grad(jnp.zeros(3), batch, jax.random.key(0))
        >>> float(jnp.linalg.norm(total.total)) <= 4 * grad.sensitivity()
        True
    """
    if not callable(loss):
        raise ValueError(f"loss={loss!r} must be a function (params, example, key)")
    check_clip(clip_norm=clip_norm, style=style)
    check_outer_norm(outer_norm, clip_norm=clip_norm)
    check_bool("residual", residual)
    check_bool("verify", verify)
    return ClippedGrad(
        loss=loss,
        clip_norm=float(clip_norm),
        style=style,
        residual=residual,
        outer_norm=float(outer_norm),
        engine=resolve_engine(
            engine, microbatch_size=microbatch_size, memory_budget=memory_budget
        ),
        verify=verify,
    )


def resolve_engine(
    engine: str | Engine,
    *,
    microbatch_size: int | None = None,
    memory_budget: float | None = None,
) -> Engine:
    """Return the engine of this name, in microbatches or within a budget if asked."""
    if not (isinstance(engine, str) or callable(engine)):
        raise ValueError(
            f"engine={engine!r} must be an engine, or the name of one: "
            f"{', '.join(ENGINES)}"
        )
    if memory_budget is not None:
        check_number("memory_budget", memory_budget)
    if memory_budget is not None and engine != "auto":
        raise ValueError(
            f"memory_budget={memory_budget} is for engine='auto', which plans; "
            f"engine={engine!r} takes what it takes: use microbatch_size"
        )
    if memory_budget is not None:
        engine = planned(memory_budget=memory_budget)
    elif isinstance(engine, str):
        if engine not in ENGINES:
            near = difflib.get_close_matches(engine, ENGINES, n=1, cutoff=0)
            raise ValueError(
                f"engine={engine!r} is unknown; did you mean {near[0]!r}? "
                f"Engines: {', '.join(ENGINES)}"
            )
        engine = ENGINES[engine]
    if microbatch_size is None:
        return engine
    return microbatched(engine, size=microbatch_size)


def _as_batch(batch: Batch | Any) -> Batch:
    if not isinstance(batch, Batch):
        size = _size_of(batch)
        return Batch(batch, jnp.ones(size, bool), jnp.arange(size))
    if batch.mask.dtype != bool:
        raise TypeError(
            f"batch.mask has dtype {batch.mask.dtype}; it must be bool, True for rows "
            "that count: an example cannot be weighted outside of its loss"
        )
    size = _size_of(batch.examples)
    for name in ("mask", "index"):
        if (shape := jnp.shape(getattr(batch, name))) != (size,):
            raise ValueError(
                f"batch.{name} has shape {shape}; it must be ({size},), one for each row"
            )
    return batch


def _size_of(examples: Any) -> int:
    """Return how many examples there are."""
    leaves = jax.tree.leaves(examples)
    for leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if isinstance(dtype, np.dtype) and dtype.kind in "OSUM":
            raise ValueError(
                f"the batch has an array of dtype {dtype}; leave it out, or make it numbers"
            )
    shapes = {jnp.shape(leaf) for leaf in leaves}
    if len({shape[:1] for shape in shapes} | {()}) != 2 or () in shapes:
        raise ValueError(
            f"the batch has arrays of shapes {sorted(shapes)}; each must begin with the axis "
            "of the examples, of one size, and there must be one"
        )
    return max(shapes)[0]


def _verify(engine: Engine, loss: Loss, query: Query, batch: Batch, key: Key) -> None:
    """Raise ValueError unless ``engine`` finds the norms of ``vmap`` on two examples."""
    if any(
        isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((query, batch, key))
    ):
        raise TypeError(
            "verify=True compares values and cannot run under jit: call the gradient once "
            "outside of jit before training, then train with verify=False"
        )
    # The batch keeps its shape, so that the plan under test is the one that will run.
    mask = jnp.cumsum(jnp.asarray(batch.mask)) <= 2
    few = batch._replace(mask=mask & batch.mask)
    run = jax.jit(lambda engine, *args: engine(loss, *args)[1], static_argnums=0)
    found = run(engine, query, few, key).norms
    expected = run(microbatched(vmap, size=1), query, few, key).norms
    # Low precision rounds differently in each engine; a wrong rule is wrong by more.
    closed = trace(loss, query.points[0], *one_example(batch, key))
    rtol = 0.05 if below_float32(closed.jaxpr) else 1e-3
    if not jnp.allclose(found, expected, rtol=rtol, equal_nan=True):
        # Norms are private, and an error ends up in logs.
        raise ValueError(
            "the engine finds other gradient norms than per-example gradients have, on "
            "the first two examples: do not train with it; use engine='vmap' and report "
            "this loss"
        )
