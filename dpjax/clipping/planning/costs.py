"""Estimates of time and memory from shapes alone, for the planner and for ``explain``."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from dpjax.clipping.analysis.uses import Program, Site
from dpjax.clipping.arithmetic import layouts
from dpjax.clipping.arithmetic.kernels import FEW_POSITIONS, prefers_turns
from dpjax.clipping.planning.plan import Method, Plan, is_formed_inside
from dpjax.clipping.planning.slots import Group
from dpjax.jaxprs import CALLS, callee, scan_counts


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
        link: Bytes per second from and to devices that share parameters.
    """

    flops: float
    bandwidth: float
    fresh: float
    round: float
    looped_convolution: float
    link: float


DEVICES = {
    "cpu": Device(
        8e10, 1e10, fresh=1.2e10, round=2e-4, looped_convolution=4.0, link=1e10
    ),
    "gpu": Device(
        2e14, 2e12, fresh=math.inf, round=2e-5, looped_convolution=1.0, link=2e11
    ),
    "tpu": Device(
        1e14, 1e12, fresh=math.inf, round=2e-5, looped_convolution=1.0, link=1e11
    ),
}
CACHED = 2**26
"""Temporaries up to this many bytes come from memory that was used before."""


def device() -> Device:
    """Return the figures of JAX's default device."""
    return DEVICES.get(jax.default_backend(), DEVICES["gpu"])


class Cost(NamedTuple):
    """Work for one example.

    Attributes:
        flops: Float operations.
        traffic: Bytes moved.
        held: Bytes that live until the sum is formed.
        passing: Bytes that live for a while; of several parts, the largest counts.
        single: Likewise, but of one example at a time, however many there are.
    """

    flops: float
    traffic: float
    held: float
    passing: float
    single: float = 0.0

    @property
    def bytes(self) -> float:
        """Bytes at the peak."""
        return self.held + self.passing

    def seconds(self, on: Device) -> float:
        """Return the estimated time."""
        return self.flops / on.flops + self.traffic / on.bandwidth


def added(costs: Iterable[Cost]) -> Cost:
    """Return the cost of all parts together."""
    flops = traffic = held = passing = single = 0.0
    for cost in costs:
        flops, traffic = flops + cost.flops, traffic + cost.traffic
        held, passing = held + cost.held, max(passing, cost.passing)
        single = max(single, cost.single)
    return Cost(flops, traffic, held, passing, single)


def group_cost(group: Group, method: Method) -> Cost:
    """Return the cost of norms and sum of one group, beyond the backward pass itself."""
    weight, factors = weight_bytes(group), factor_bytes(group)
    h, t, k, n = _group_sizes(group)
    product = 2 * h * t * k * n
    if method == "keep" and is_formed_inside(group):
        turns = math.prod(loop.length for loop in group.sites[0].loops)
        passing = 2 * factors / max(turns, 1)
        return Cost(product, 3 * factors + 3 * weight, weight, passing)
    if method == "keep":
        kept = Cost(product, factors + 3 * weight, weight + _kept_bytes(group), 0)
        in_turn = prefers_turns() and t > FEW_POSITIONS
        return kept._replace(**{"single" if in_turn else "passing": _cut(group)})
    total = Cost(product, 3 * factors, _kept_bytes(group), _cut(group))
    return added([_norm_cost(group, method), total])


def probe_cost(group: Group, method: Method) -> Cost:
    """Return the same where the second pass measures again what it sums."""
    cost = group_cost(group, method)
    # The factors live while the site is probed, those of one iteration of a loop, and a
    # copy of them that is weighted or in another order (patches are such copies).
    turns = math.prod(loop.length for loop in group.sites[0].loops)
    live = (1 if _of_images(group) else 2) * cost.held / max(turns, 1)
    cost = cost._replace(held=0.0, passing=cost.passing + live)
    # The rows that are formed for a direct norm are those that are summed.
    return cost if method == "direct" else added([cost, _norm_cost(group, method)])


def _norm_cost(group: Group, method: Method) -> Cost:
    weight, factors, cut = weight_bytes(group), factor_bytes(group), _cut(group)
    h, t, k, n = _group_sizes(group)
    if method == "direct":
        # A lookup has no product, but fills a table.
        flops = 2 * h * t * k * n + weight // 4
        return Cost(flops, factors + 2 * weight, 0, cut + weight)
    if t == 1:
        cost = Cost(2 * h * (k + n), factors, 0, cut)
    else:
        gram = 4 * h * t * t
        # Both matrices, and their product, are written and read, the former for slack too.
        cost = Cost(2 * h * t * t * (k + n), factors + 8 * gram, 0, cut + 2 * gram)
    count, through = len(group.numbers), 4 * h * t * n
    across = Cost(2 * h * t * k * n, factors + 2 * through, 0, through)
    return added([cost, *[across] * count])


def _cut(group: Group) -> int:
    """Return the bytes that patches take while they are cut, one axis after the other."""
    return 3 * factor_bytes(group) if _of_images(group) else 0


def saved_bytes(group: Group, method: Method) -> float:
    """Return the bytes of one example that live from the norms to the sum.

    Of lookups what passes counts, too: one gradient of a table may be larger than all else.
    So it does where numbers are computed from a weight: Gram matrices then take about as
    many FLOPs as gradients, and much less memory.

    FLOPs count for so little that those of a whole program are less than a byte: they
    decide between methods that save as many.
    """
    saved = weight_bytes(group) if method == "keep" else _kept_bytes(group)
    cost = group_cost(group, method)
    if group.numbers or all(site.kind == "gather" for site in group.sites):
        saved += cost.passing
    return saved + 2.0**-48 * cost.flops


def cut_bytes(group: Group, method: Method) -> float:
    """Return ``saved_bytes``, but of images when their patches are cut out."""
    saved = weight_bytes(group) if method == "keep" else factor_bytes(group)
    return saved + 2.0**-48 * group_cost(group, method).flops


def weight_bytes(group: Group) -> int:
    """Return the bytes of one per-example gradient of a group."""
    size = layouts.sizes(group.sites[0])
    return 4 * size.h * size.k * size.n


def factor_bytes(group: Group) -> int:
    """Return the bytes of one example's factors, patches cut out."""
    h, t, k, n = _group_sizes(group)
    return 4 * h * t * (k + n)


def _kept_bytes(group: Group) -> int:
    """Return the bytes of one example's factors as they are kept: of images, whole."""
    if not _of_images(group):
        return factor_bytes(group)
    sizes = [
        math.prod(loop.length for loop in site.loops)
        * (math.prod(site.data_shape) + math.prod(site.out_shape))
        for site in group.sites
    ]
    return 4 * sum(sizes)


def _of_images(group: Group) -> bool:
    return all(site.kind == "conv_general_dilated" for site in group.sites)


def _group_sizes(group: Group) -> tuple[int, int, int, int]:
    sizes = [layouts.sizes(site) for site in group.sites]
    h, k, n = sizes[0].h, sizes[0].k, sizes[0].n
    if all(site.kind == "gather" for site in group.sites):
        k = 0  # One-hot factors cost nothing; rows are added one by one.
    return h, sum(size.t for size in sizes), k, n


def example_cost(program: Program, plan: Plan) -> Cost:
    """Return the cost of one example under a plan, passes included."""
    groups = [group_cost(group, method) for group, method in plan.methods.items()]
    for path, method in plan.probed.items():
        groups.append(probe_cost(Group((program.sites[path],), (False,)), method))
    plain = [4 * math.prod(program.shapes[program.slot(i)]) for i in program.plain]
    # Differentiated for all examples, a kernel's axes come in another order: one copy.
    formed = Cost(0, 2 * sum(plain), sum(plain), max(plain, default=0))
    derived = {
        site.path: (site, slot.index in plan.dropped)
        for slot in plan.slots
        if slot.materialised
        for site in slot.sites
    }
    for site, dropped in derived.values():
        group, method = Group((site,), (False,)), "direct" if dropped else "keep"
        cost = group_cost(group, method)
        if dropped:  # Before and after the way back to the parameters.
            cost = cost._replace(passing=cost.passing + weight_bytes(group))
        formed = added([formed, cost])
    # Forward and backward pass: two products at each site.
    passes = 2 * sum(_product(site) for site in program.sites.values())
    work = Cost(passes * (2 if plan.probed else 1), 0, 0, 0)
    return added([*groups, formed, work, _activations(program)])


def parameter_bytes(program: Program) -> int:
    """Return the bytes of one float32 copy of the parameters."""
    return 4 * sum(math.prod(shape) for shape in program.shapes)


def layer_bytes(program: Program) -> float:
    """Return the bytes of the largest parameter that is used at once.

    Of one that a loop uses in turn, those of a turn.
    """
    turns = dict.fromkeys(range(len(program.names)), 1)
    for site in program.sites.values():
        for leaf in site.value.leaves:
            turns[program.slot(leaf)] = math.prod(x.length for x in site.value.loops)
    return max(4 * math.prod(program.shapes[i]) / n for i, n in turns.items())


def constant_bytes(program: Program) -> int:
    """Return the bytes of what the loss closes over, such as frozen parameters."""
    return sum(_bytes(const) for const in program.closed.consts)


def convolves(program: Program) -> bool:
    """Whether any use of a parameter is a convolution."""
    return any(s.kind == "conv_general_dilated" for s in program.sites.values())


def _product(site: Site) -> int:
    size = layouts.sizes(site)
    return 0 if site.kind == "gather" else 2 * size.h * size.t * size.k * size.n


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


def _activations(program: Program) -> Cost:
    """Return the bytes of values that depend on the example, before any are fused."""
    jaxpr = program.closed.jaxpr
    data = [i >= program.num_params for i in range(len(jaxpr.invars))]
    return _values(jaxpr, data)


def _values(jaxpr: Jaxpr, data: Sequence[bool]) -> Cost:
    known = {var for var, flag in zip(jaxpr.invars, data, strict=True) if flag}
    parts = []
    for eqn in jaxpr.eqns:
        flags = [not isinstance(v, Literal) and v in known for v in eqn.invars]
        if any(flags):
            known.update(eqn.outvars)
            parts.append(_values_of(eqn, flags))
    return added(parts)


def _values_of(eqn: JaxprEqn, flags: list[bool]) -> Cost:
    name = eqn.primitive.name
    if name in _FREE:
        return Cost(0, 0, 0, 0)
    out = Cost(0, 0, sum(_bytes(var.aval) for var in eqn.outvars), 0)
    if name == "scan":
        first, count = scan_counts(eqn)
        flags = [*flags[:first], *([True] * count), *flags[first + count :]]
        body = _values(eqn.params["jaxpr"].jaxpr, flags)
        carry = sum(_bytes(var.aval) for var in eqn.outvars[:count])
        held = eqn.params["length"] * (body.held + carry)
        return Cost(0, 0, held, body.passing)
    if name in CALLS:
        inner = _values(callee(eqn).jaxpr, flags)
        if "prevent_cse" in eqn.params:  # Checkpointed: computed again when needed.
            return out._replace(passing=inner.bytes)
        return inner
    return out


def _bytes(aval: Any) -> int:
    return math.prod(getattr(aval, "shape", ())) * aval.dtype.itemsize
