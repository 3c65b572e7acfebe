"""Types for values that noise has not yet made safe.

They guard against mistakes, not malice: ``jax.tree.leaves`` opens anything.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpjax.typing import Params, Scalar

SEAL = 0.7548777
"""An odd value: no fixed point of sign, square, reciprocal or rounding."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ClippedSum:
    """A sum of clipped per-example vectors: sensitive until a mechanism releases it.

    It is not shaped like params, so an optax transform that keeps a state of that shape
    fails on it; one that rescales values changes the seal, and release then answers NaN.
    Adding a sum to itself is not noticed: merge disjoint sets only.

    Attributes:
        total: ``sum_i f_i d_i``, like params, at least float32.
        residual: ``sum_i (mask_i - f_i) d_i``, like params, or None if not asked for.
        seal: ``SEAL`` when made; what changes the sum by mistake changes this too.
        l2_bound: How far adding or removing one example can move ``total``.
        phase: Static; the kind of query this answers.
    """

    total: Params
    residual: Params | None
    seal: Scalar
    l2_bound: Scalar
    phase: str = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        return "ClippedSum(private until a mechanism releases it)"

    @classmethod
    def zeros(
        cls,
        params: Params,
        *,
        l2_bound: float | Scalar,
        residual: bool = False,
        phase: str = "gradient",
    ) -> "ClippedSum":
        """Return the sum over no examples, with leaves shaped like ``params``."""

        def empty() -> Params:
            return jax.tree.map(
                lambda p: jnp.zeros(p.shape, accumulation_dtype(p.dtype)), params
            )

        return cls(
            total=empty(),
            residual=empty() if residual else None,
            seal=_seal(),
            l2_bound=jnp.asarray(l2_bound, jnp.float32),
            phase=phase,
        )

    def merge(self, other: "ClippedSum") -> "ClippedSum":
        """Return the sum over both sets of examples, which must be disjoint.

        Sensitivity: the shared ``l2_bound``, since an example is in one set only; with
        different bounds, the seal breaks.
        """
        if self.phase != other.phase:
            raise ValueError(
                f"phase={self.phase!r} and phase={other.phase!r} are different queries: "
                "their sums cannot be merged"
            )
        sealed = (self.seal == _seal()) & (other.seal == _seal())
        intact = sealed & (self.l2_bound == other.l2_bound)
        total, residual = jax.tree.map(
            jnp.add, (self.total, self.residual), (other.total, other.residual)
        )
        seal = jnp.where(intact, self.seal, jnp.nan)
        return ClippedSum(total, residual, seal, self.l2_bound, self.phase)


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
    intact = (clipped.seal == _seal()) & (clipped.l2_bound <= bound)
    return jax.tree.map(lambda x: jnp.where(intact, x, jnp.nan), clipped.total)


def _seal() -> Scalar:
    return jnp.asarray(SEAL, jnp.float32)


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype sums are kept in: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)
