"""Types for values that noise has not yet made safe.

They guard against mistakes, not malice: ``jax.tree.leaves`` opens anything.
"""

import dataclasses
import math

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
        total: ``sum_i f_i d_i``, at least float32: like params, or one number for
            slopes.
        residual: What clipping cut off, summed, like total; None if not asked for.
        count: ``float32``, the sum over all examples of 1/2 if the norm is at most
            ``l2_bound`` and -1/2 if not; None if not asked for. One example moves it by 1/2.
        seal: ``SEAL`` when made; what changes the sum by mistake changes this too.
        l2_bound: How far adding or removing one example can move ``total``.
        outer_norm: How far each example was clipped first; inf if it was not. With flat
            clipping, one example moves ``residual`` by at most ``outer_norm - l2_bound``.
        phase: Static; the kind of query this answers.
    """

    total: Params
    residual: Params | None
    count: Scalar | None
    seal: Scalar
    l2_bound: Scalar
    outer_norm: Scalar
    phase: str = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        return "ClippedSum(private until a mechanism releases it)"

    def __contains__(self, key: object) -> bool:
        """Return False: flax's ``TrainState.apply_gradients`` looks for a name in it."""
        del key
        return False

    @classmethod
    def zeros(
        cls,
        params: Params,
        *,
        l2_bound: float | Scalar,
        outer_norm: float | Scalar = math.inf,
        residual: bool = False,
        count: bool = False,
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
            count=jnp.zeros((), jnp.float32) if count else None,
            seal=_seal(),
            l2_bound=jnp.asarray(l2_bound, jnp.float32),
            outer_norm=jnp.asarray(outer_norm, jnp.float32),
            phase=phase,
        )

    def merge(self, other: "ClippedSum") -> "ClippedSum":
        """Return the sum over both sets of examples, which must be disjoint.

        Sensitivity: the shared bounds, since an example is in one set only; with
        different bounds, the seal breaks.
        """
        if self.phase != other.phase:
            raise ValueError(
                f"phase={self.phase!r} and phase={other.phase!r} are different queries: "
                "their sums cannot be merged"
            )
        sealed = (self.seal == _seal()) & (other.seal == _seal())
        intact = sealed & (self.l2_bound == other.l2_bound)
        intact &= self.outer_norm == other.outer_norm
        total, residual, count = jax.tree.map(
            jnp.add,
            (self.total, self.residual, self.count),
            (other.total, other.residual, other.count),
        )
        return dataclasses.replace(
            self,
            total=total,
            residual=residual,
            count=count,
            seal=jnp.where(intact, self.seal, jnp.nan),
        )

    def stacked(self, parts: int) -> "ClippedSum":
        """Return ``parts`` copies, on a new first axis of every leaf.

        Of a sum over no examples these are partial sums to begin with, one for each
        device.
        """
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (parts, *x.shape)), self)

    def only(self) -> "ClippedSum":
        """Return the one sum of a stack of one."""
        return jax.tree.map(lambda x: jnp.squeeze(x, 0), self)

    def merged(self) -> "ClippedSum":
        """Return the sum over the sets of examples of a stack, which must be disjoint.

        Sensitivity: as of ``merge``.
        """
        intact = jnp.all(self.seal == _seal())
        intact &= jnp.all(self.l2_bound == self.l2_bound[0])
        intact &= jnp.all(self.outer_norm == self.outer_norm[0])
        total, residual, count = jax.tree.map(
            lambda x: jnp.sum(x, axis=0), (self.total, self.residual, self.count)
        )
        return dataclasses.replace(
            self,
            total=total,
            residual=residual,
            count=count,
            seal=jnp.where(intact, _seal(), jnp.nan),
            l2_bound=self.l2_bound[0],
            outer_norm=self.outer_norm[0],
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class PerExample:
    """Per-example statistics: private, refused by every writer. See ``reveal``.

    Attributes:
        losses: ``float32[B]``, at the first query point (about it, for slopes); 0 on padding.
        norms: ``float32[B]``, L2 norm of ``d_i`` before clipping; 0 on padding.
        nonfinite: ``bool[B]``, examples zeroed because their ``d_i`` was NaN or inf.
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
    intact = _intact(clipped, l2_bound=l2_bound)
    return jax.tree.map(lambda x: jnp.where(intact, x, jnp.nan), clipped.total)


def opened_residual(
    clipped: ClippedSum,
    *,
    l2_bound: float | Scalar,
    outer_norm: float | Scalar = math.inf,
) -> Params:
    """Return the plain sum of what clipping cut off, for a mechanism's release only.

    All NaN if the seal is broken, if the sum was not clipped to exactly ``l2_bound`` (to
    less would leave more in the residual), or if its examples were not clipped to
    ``outer_norm`` first.

    Raises:
        TypeError: The sum has no residual.
    """
    if clipped.residual is None:
        raise TypeError(
            "this ClippedSum has no residual; ask with Query(residual=True)"
        )
    intact = _intact(clipped, l2_bound=l2_bound)
    intact &= clipped.l2_bound == jnp.asarray(l2_bound, jnp.float32)
    intact &= clipped.outer_norm <= jnp.asarray(outer_norm, jnp.float32)
    return jax.tree.map(lambda x: jnp.where(intact, x, jnp.nan), clipped.residual)


def opened_count(clipped: ClippedSum, *, l2_bound: float | Scalar) -> Scalar:
    """Return the plain count of norms within the bound, for a mechanism's release only.

    NaN if the seal is broken, or if the sum was clipped to more than ``l2_bound``.

    Raises:
        TypeError: The sum has no count.
    """
    if clipped.count is None:
        raise TypeError("this ClippedSum has no count; ask with Query(count=True)")
    return jnp.where(_intact(clipped, l2_bound=l2_bound), clipped.count, jnp.nan)


def _intact(clipped: ClippedSum, *, l2_bound: float | Scalar) -> Scalar:
    if jnp.ndim(clipped.seal):
        raise TypeError("these are partial sums; release their sum, .merged()")
    bound = jnp.asarray(l2_bound, jnp.float32)
    return (clipped.seal == _seal()) & (clipped.l2_bound <= bound)


def _seal() -> Scalar:
    return jnp.asarray(SEAL, jnp.float32)


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype sums are kept in: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)
