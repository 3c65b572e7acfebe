"""Estimates of time and memory from shapes alone, for the planner and for ``explain``."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn

from dpjax.clipping import layouts
from dpjax.clipping.analysis import CALLS, Program, callee
from dpjax.clipping.plan import Method, Plan
from dpjax.clipping.slots import Group


@dataclasses.dataclass(frozen=True)
class Device:
    """What the planner assumes of a device. Orders of magnitude are enough.

    Attributes:
        flops: Float operations per second of a matrix product.
        bandwidth: Bytes per second from and to memory.
        fresh: Bytes per second at which large temporaries are provided: page faults on a
            CPU; infinite where an allocator keeps them.
        round: Seconds that one more microbatch costs at least.
        looped_convolution: Slow-down of a convolution inside a loop.
    """

    flops: float
    bandwidth: float
    fresh: float
    round: float
    looped_convolution: float


DEVICES = {
    "cpu": Device(8e10, 1e10, fresh=4e9, round=2e-4, looped_convolution=4.0),
    "gpu": Device(2e14, 2e12, fresh=math.inf, round=2e-5, looped_convolution=1.0),
    "tpu": Device(1e14, 1e12, fresh=math.inf, round=2e-5, looped_convolution=1.0),
}


CACHED = 2**26
"""Temporaries up to this many bytes come from memory that was used before."""


def device() -> Device:
    """Return the figures of JAX's default device."""
    platform = jax.default_backend()
    return DEVICES.get(platform, DEVICES["gpu"])


class Cost(NamedTuple):
    """Work for one example.

    Attributes:
        flops: Float operations.
        traffic: Bytes moved.
        held: Bytes that live until the sum is formed.
        passing: Bytes that live while this norm is formed.
    """

    flops: float
    traffic: float
    held: float
    passing: float

    def seconds(self, on: Device) -> float:
        """Return the estimated time of one example."""
        return self.flops / on.flops + self.traffic / on.bandwidth


def group_cost(group: Group, method: Method) -> Cost:
    """Return the cost of norms and sum of one group, beyond the backward pass itself."""
    all_sizes = [layouts.sizes(site) for site in group.sites]
    h, k, n = all_sizes[0].h, all_sizes[0].k, all_sizes[0].n
    t = sum(size.t for size in all_sizes)
    weight = 4 * h * k * n
    if all(site.kind == "gather" for site in group.sites):
        k = 0  # One-hot factors cost nothing; rows are added one by one.
    factors, square = 4 * h * t * (k + n), 4 * h * t * t
    product = 2 * h * t * k * n
    if method == "keep":
        return Cost(product, factors + 3 * weight, weight, 0)
    contraction = Cost(product, 3 * factors, 0, 0)
    if method == "direct":
        norm = Cost(product, factors + 2 * weight, 0, weight)
    elif t == 1:
        norm = Cost(2 * h * (k + n), factors, 0, 0)
    else:
        norm = Cost(2 * h * t * t * (k + n), factors + 4 * square, 0, 2 * square)
    return Cost(*(a + b for a, b in zip(norm, contraction, strict=True)))


def plain_bytes(program: Program) -> int:
    """Return the bytes of one example's plainly differentiated gradients."""
    return 4 * sum(math.prod(program.shapes[program.slot(i)]) for i in program.plain)


class Activations(NamedTuple):
    """Bytes of one example's intermediate values.

    Attributes:
        saved: Alive from the forward to the backward pass.
        passing: Alive only while a part that is computed again is differentiated.
    """

    saved: float
    passing: float


def activations(program: Program) -> Activations:
    """Return the intermediate values of one example, before the compiler fuses any."""
    jaxpr = program.closed.jaxpr
    depends = [i >= program.num_params for i in range(len(jaxpr.invars))]
    return _activations(jaxpr, depends)[0]


_FREE = frozenset(
    {
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "reshape",
        "squeeze",
        "stop_gradient",
        "transpose",
    }
)


def _activations(
    jaxpr: Jaxpr, depends: Sequence[bool]
) -> tuple[Activations, list[bool]]:
    """Add up values that depend on the example; also say which outputs do."""
    known = {
        var: flag for var, flag in zip(jaxpr.invars, depends, strict=True) if flag
    }
    saved, passing = 0.0, 0.0
    for eqn in jaxpr.eqns:
        flags = [_hashable(atom) and known.get(atom, False) for atom in eqn.invars]
        if not any(flags):
            continue
        known.update(dict.fromkeys(eqn.outvars, True))
        part = _equation(eqn, flags)
        saved += part.saved
        passing = max(passing, part.passing)
    out = [bool(_hashable(atom) and known.get(atom, False)) for atom in jaxpr.outvars]
    return Activations(saved, passing), out


def _equation(eqn: JaxprEqn, flags: list[bool]) -> Activations:
    name = eqn.primitive.name
    out = sum(_bytes(var.aval) for var in eqn.outvars)
    if name in _FREE:
        return Activations(0, 0)
    if name == "scan":
        body, _ = _activations(eqn.params["jaxpr"].jaxpr, _scan_flags(eqn, flags))
        carry = sum(
            _bytes(var.aval) for var in eqn.outvars[: eqn.params["num_carry"]]
        )
        length = eqn.params["length"]
        return Activations(length * (body.saved + carry), body.passing)
    if name in CALLS:
        inner, _ = _activations(callee(eqn).jaxpr, flags)
        if "prevent_cse" in eqn.params:  # Checkpointed: computed again when needed.
            return Activations(out, inner.saved + inner.passing)
        return inner
    return Activations(out, 0)


def _scan_flags(eqn: JaxprEqn, flags: list[bool]) -> list[bool]:
    first, count = eqn.params["num_consts"], eqn.params["num_carry"]
    carry = [True] * count
    return [*flags[:first], *carry, *flags[first + count :]]


def _hashable(atom: object) -> bool:
    return not isinstance(atom, jax.extend.core.Literal)


def _bytes(aval: object) -> int:
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", jnp.float32)
    return math.prod(shape) * getattr(dtype, "itemsize", 8)


def backward_seconds(program: Program, on: Device) -> float:
    """Return the estimated time of one example's forward and backward pass at the sites."""
    flops = 0.0
    for site in program.sites.values():
        size = layouts.sizes(site)
        if site.kind != "gather":
            flops += 4 * size.h * size.t * size.k * size.n
    return flops / on.flops


def materialised_bytes(plan: Plan) -> int:
    """Return the bytes of one example's gradients that are formed in full."""
    return 4 * sum(
        math.prod(site.weight_shape)
        for slot in plan.slots
        if slot.materialised
        for site in slot.sites
    )


def tapped_bytes(program: Program, plan: Plan) -> int:
    """Return the bytes of one example's output gradients that are saved for later."""
    return sum(
        _bytes(site.eqn.outvars[0].aval) * math.prod(loop.length for loop in site.loops)
        for path, site in program.sites.items()
        if path not in plan.probed
    )
