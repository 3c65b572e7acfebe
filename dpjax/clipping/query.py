"""What an engine is asked: which vector of each example, and how far to clip it."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpjax.checks import ClipStyle, check_style
from dpjax.privacy.sensitive import ClippedSum
from dpjax.typing import Params, Scalar


class Slope(NamedTuple):
    """Ask how the loss of each example changes along a line, instead of its gradient.

    ``(loss(x + span u; i) - loss(x - span u; i)) / (2 span)``, one number, from two forward
    passes with the same randomness.

    Attributes:
        direction: u, like params.
        span: Positive.
    """

    direction: Params
    span: float | Scalar


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Query:
    """Ask for ``sum_i clip(d_i)`` with ``d_i = sum_k signs[k] grad loss(points[k]; i)``.

    With a ``slope`` each ``d_i`` is one number, and so is the sum: see ``Slope``.

    Attributes:
        points: K pytrees of the same structure; (x_t,) for DP-SGD.
        clip_norm: C >= 0, the L2 bound on what one example contributes; may be traced.
        signs: K signs, static; (1.0, -1.0) for a gradient difference.
        style: Static. "flat": ``d min(1, C/|d|)``. "automatic": ``d C/(|d| + 0.01)``
            (AUTO-S, Bu et al. 2023, arXiv 2206.07136). "per_layer": each of the G
            layers (leaves with the same parent) clipped flat to ``C/sqrt(G)``. In
            each style one example contributes at most C.
        residual: Static; whether to sum ``d_i - clip(d_i)`` too.
        count: Static; whether to count the examples with ``|d_i| <= clip_norm``, too.
        outer_norm: G; each ``d_i`` is first replaced by ``d_i min(1, G/|d_i|)``, so that
            no residual is longer than G. May be traced; inf (no such limit) by default.
        phase: Static; the kind of query, which the mechanism's release must know.
        slope: None for gradients; else the slope of losses at the only point.

    Raises:
        ValueError: An unknown style, a negative clip norm, or more or fewer signs than
            points.
    """

    points: tuple[Params, ...]
    clip_norm: float | Scalar
    signs: tuple[float, ...] = dataclasses.field(
        default=(1.0,), metadata={"static": True}
    )
    style: ClipStyle = dataclasses.field(default="flat", metadata={"static": True})
    residual: bool = dataclasses.field(default=False, metadata={"static": True})
    count: bool = dataclasses.field(default=False, metadata={"static": True})
    outer_norm: float | Scalar = math.inf
    phase: str = dataclasses.field(default="gradient", metadata={"static": True})
    slope: Slope | None = None

    def __post_init__(self) -> None:
        check_style("style", self.style)
        # JAX rebuilds it with whatever stands for numbers and trees.
        if isinstance(self.clip_norm, int | float) and not self.clip_norm >= 0:
            raise ValueError(f"clip_norm={self.clip_norm} must be at least 0")
        if isinstance(self.points, tuple) and len(self.points) != len(self.signs):
            raise ValueError(
                f"signs={self.signs} must be one for each of {len(self.points)} points"
            )
        if isinstance(self.points, tuple) and not self.points:
            raise ValueError("points=() asks for no gradient; name at least one point")

    def empty(self) -> ClippedSum:
        """Return the answer over no examples."""
        return ClippedSum.zeros(
            self.points[0] if self.slope is None else jnp.zeros(()),
            l2_bound=self.l2_bound,
            outer_norm=self.outer_norm,
            residual=self.residual,
            count=self.count,
            phase=self.phase,
        )

    @property
    def l2_bound(self) -> Scalar:
        """How far adding or removing one example moves the clipped sum: ``clip_norm``."""
        return jnp.asarray(self.clip_norm, jnp.float32)
