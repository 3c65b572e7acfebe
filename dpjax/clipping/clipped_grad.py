"""The front door: a function transformation in JAX's style, usable on its own."""

import dataclasses
import difflib
from typing import Any

import jax
import jax.numpy as jnp

from dpjax.checks import ClipStyle, check_clip
from dpjax.clipping.microbatched import microbatched
from dpjax.clipping.query import Query
from dpjax.clipping.types import Engine
from dpjax.clipping.vmap import vmap
from dpjax.sensitive import ClippedSum, PerExample
from dpjax.typing import Batch, Key, Loss, Params

ENGINES: dict[str, Engine] = {"vmap": vmap}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippedGrad:
    """What ``clipped_grad`` returns: call it on (params, batch, key)."""

    loss: Loss
    clip_norm: float
    style: ClipStyle
    residual: bool
    engine: Engine

    def __call__(
        self, params: Params, batch: Batch | Any, key: Key
    ) -> tuple[ClippedSum, PerExample]:
        """Return the clipped gradient sum and private per-example statistics.

        Args:
            params: Pytree of floating-point arrays.
            batch: A ``Batch``, or a pytree of examples ``[B, ...]`` that all count.
            key: Randomness of the loss (dropout, augmentation); not the noise key.
        """
        if not isinstance(batch, Batch):
            size = jax.tree.leaves(batch)[0].shape[0]
            batch = Batch(batch, jnp.ones(size, bool), jnp.arange(size))
        query = Query(
            (params,),
            clip_norm=self.clip_norm,
            style=self.style,
            residual=self.residual,
        )
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
    engine: str | Engine = "vmap",
    microbatch_size: int | None = None,
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
        engine: Name or function; all engines compute the same.
        microbatch_size: Examples at once; None for the whole batch.

    Raises:
        ValueError: A clip norm that is not positive and finite, an unknown style or
            engine, a microbatch size below 1.

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
    check_clip(clip_norm=clip_norm, style=style)
    return ClippedGrad(
        loss=loss,
        clip_norm=float(clip_norm),
        style=style,
        residual=residual,
        engine=resolve_engine(engine, microbatch_size=microbatch_size),
    )


def resolve_engine(engine: str | Engine, *, microbatch_size: int | None) -> Engine:
    """Return the engine of this name, in microbatches if asked."""
    if isinstance(engine, str):
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
