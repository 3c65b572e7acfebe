"""Read and run the equations of a jaxpr."""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, JaxprEqn


def bind(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Run one equation."""
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """Return how many operands of a ``scan`` are constants, and how many are carried."""
    if "ft_in" in eqn.params:  # From JAX 0.11 on.
        consts, carry, _ = eqn.params["ft_in"].unpack()
        return len(consts), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]


CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
)
"""Primitives whose jaxpr runs once, on the operands as they are."""


def callee(eqn: JaxprEqn) -> ClosedJaxpr:
    """Return the jaxpr that a call primitive runs."""
    inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
    return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
