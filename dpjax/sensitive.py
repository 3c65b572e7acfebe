"""Types for values that noise has not yet made safe.

They guard against mistakes, not malice: ``jax.tree.leaves`` opens anything.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpjax.typing import Params, Scalar


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClippedSum:
    """A sum of clipped per-example vectors: sensitive until a mechanism releases it.

    It is not shaped like params, so an optax transform with state fails on it; one
    without state changes the seal, and release then answers NaN.

    Attributes:
        total: ``sum_i f_i d_i``, like params, at least float32.
        residual: ``sum_i (mask_i - f_i) d_i``, like params, or None if not asked for.
        seal: 1.0 when made; anything that rescales the sum rescales this too.
        l2_bound: How far adding or removing one example can move ``total``.
    """

    total: Params
    residual: Params | None
    seal: Scalar
    l2_bound: Scalar

    @classmethod
    def zeros(
        cls, params: Params, *, l2_bound: float | Scalar, residual: bool = False
    ) -> "ClippedSum":
        """Return the sum over no examples, with leaves shaped like ``params``."""

        def empty() -> Params:
            return jax.tree.map(
                lambda p: jnp.zeros(p.shape, accumulation_dtype(p.dtype)), params
            )

        return cls(
            total=empty(),
            residual=empty() if residual else None,
            seal=jnp.ones((), jnp.float32),
            l2_bound=jnp.asarray(l2_bound, jnp.float32),
        )

    def merge(self, other: "ClippedSum") -> "ClippedSum":
        """Return the sum over both sets of examples, which must be disjoint.

        Sensitivity: the shared ``l2_bound``, since an example is in one set only; with
        different bounds, the seal breaks.
        """
        intact = (
            (self.seal == 1) & (other.seal == 1) & (self.l2_bound == other.l2_bound)
        )
        total, residual = jax.tree.map(
            jnp.add, (self.total, self.residual), (other.total, other.residual)
        )
        seal = jnp.where(intact, self.seal, jnp.nan)
        return ClippedSum(total, residual, seal, self.l2_bound)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class PerExample:
    """Per-example statistics: private, refused by every writer. See ``reveal``.

    Attributes:
        losses: ``float32[B]``, at the first query point; 0 on padding.
        norms: ``float32[B]``, L2 norm before clipping; 0 on padding.
        nonfinite: ``bool[B]``, examples zeroed because their gradient was NaN or inf.
        mask: ``bool[B]``, False on padding.
    """

    losses: Float[Array, "B"]
    norms: Float[Array, "B"]
    nonfinite: Bool[Array, "B"]
    mask: Bool[Array, "B"]

    def __repr__(self) -> str:
        return "PerExample(private; dpjax.reveal opens it)"


def reveal(per_example: PerExample) -> dict[str, Array]:
    """Open private statistics, ``[B]`` each. What you do with them is not private."""
    fields = dataclasses.fields(per_example)
    return {field.name: getattr(per_example, field.name) for field in fields}


def opened(clipped: ClippedSum, *, l2_bound: float | Scalar) -> Params:
    """Return the plain sum, for a mechanism's release only.

    All NaN if the seal is broken, or if the sum was clipped to more than ``l2_bound``.
    """
    bound = jnp.asarray(l2_bound, jnp.float32)
    intact = (clipped.seal == 1) & (clipped.l2_bound <= bound)
    return jax.tree.map(lambda x: jnp.where(intact, x, jnp.nan), clipped.total)


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype sums are kept in: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)
