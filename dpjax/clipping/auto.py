"""The planner: how to compute the clipped sum of this loss, from its shapes alone."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from dpjax.clipping import costs
from dpjax.clipping.analysis import Program, analyse
from dpjax.clipping.costs import Cost, Device, group_cost
from dpjax.clipping.execute import run_plan
from dpjax.clipping.ghost import can_probe
from dpjax.clipping.microbatched import microbatched
from dpjax.clipping.plan import Method, Plan
from dpjax.clipping.query import Query
from dpjax.clipping.slots import Slot, find_slots
from dpjax.clipping.types import Engine
from dpjax.sensitive import ClippedSum, PerExample
from dpjax.typing import Batch, Key, Loss


def auto(
    loss: Loss, query: Query, batch: Batch, key: Key
) -> tuple[ClippedSum, PerExample]:
    """Return the clipped sum by the estimated fastest plan. See ``planned``."""
    return planned(memory_budget=default_budget())(loss, query, batch, key)


def planned(*, memory_budget: float) -> Engine:
    """Return the engine that plans for the loss it is given.

    For each use of each parameter it chooses between Gram matrices, per-example gradients
    that are dropped and ones that are kept; for the step between one and two backward
    passes; and the number of examples at once: by the estimated time, among the plans
    whose estimated temporaries fit the budget.

    Args:
        memory_budget: Bytes that the temporaries of one call may take.
    """

    def engine(
        loss: Loss, query: Query, batch: Batch, key: Key
    ) -> tuple[ClippedSum, PerExample]:
        program = analyse(loss, query, batch, key)
        choice = choose(program, batch.mask.shape[0], memory_budget=memory_budget)

        def run(
            loss: Loss, query: Query, batch: Batch, key: Key
        ) -> tuple[ClippedSum, PerExample]:
            del loss
            return run_plan(program, choice.plan, query, batch, key)

        if choice.microbatch_size < batch.mask.shape[0]:
            run = microbatched(run, size=choice.microbatch_size)
        return run(loss, query, batch, key)

    return engine


def default_budget() -> float:
    """Return half of what the device says it has left; 2 GiB where it does not say."""
    statistics = jax.devices()[0].memory_stats() or {}
    limit, used = statistics.get("bytes_limit", 0), statistics.get("bytes_in_use", 0)
    return (limit - used) / 2 if limit else 2**31


class Choice(NamedTuple):
    """What the planner decided, and what it expects.

    Attributes:
        plan: What to do at each site.
        microbatch_size: Examples at once.
        seconds: Estimated time of one call.
        peak: Estimated bytes of temporaries.
    """

    plan: Plan
    microbatch_size: int
    seconds: float
    peak: float


def choose(
    program: Program,
    examples: int,
    *,
    memory_budget: float,
    on: Device | None = None,
) -> Choice:
    """Return the estimated fastest plan whose temporaries fit the budget.

    Raises:
        ValueError: None fits.
    """
    on = on or costs.device()
    choices = [
        estimate(program, plan, size, examples, on)
        for plan in _candidates(program, on)
        for size in _divisors(examples)
    ]
    fitting = [choice for choice in choices if choice.peak <= memory_budget]
    if not fitting:
        least = min(choice.peak for choice in choices)
        raise ValueError(
            f"memory_budget={memory_budget:.3g} bytes is too small: the leanest plan for "
            f"one example at a time takes about {least:.3g}"
        )
    return min(fitting, key=lambda choice: choice.seconds)


def _candidates(program: Program, on: Device) -> Iterator[Plan]:
    slots = find_slots(program)

    def plan(price: Callable[[Cost], float], probed: frozenset) -> Plan:
        methods: dict = {}
        for slot in slots:
            for group in () if slot.materialised else slot.groups:
                options: tuple[Method, ...] = ("gram", "direct", "keep")
                if group.sites[0].path in probed:
                    options = ("gram", "direct")
                methods[group] = min(
                    options, key=lambda m, group=group: price(group_cost(group, m))
                )
        return Plan(tuple(slots), methods, probed)

    yield plan(lambda cost: cost.seconds(on), frozenset())
    yield plan(lambda cost: cost.held + cost.passing, frozenset())
    probed = frozenset(slot.sites[0].path for slot in slots if can_probe(slot))
    if probed:
        yield plan(lambda cost: cost.seconds(on), probed)


def estimate(
    program: Program, plan: Plan, size: int, examples: int, on: Device
) -> Choice:
    """Return what a plan is expected to cost with ``size`` examples at once."""
    values = costs.activations(program)
    norms = [group_cost(group, method) for group, method in plan.methods.items()]
    work = Cost(*map(sum, zip(*norms, strict=True))) if norms else Cost(0, 0, 0, 0)
    passing = max([cost.passing for cost in norms] + [values.passing], default=0.0)
    plain = costs.plain_bytes(program)
    materialised = costs.materialised_bytes(plan)
    tapped = costs.tapped_bytes(program, plan)
    params = 4 * sum(math.prod(shape) for shape in program.shapes)
    held = values.saved + work.held + plain + materialised + tapped
    # Cotangents are alive beside the values that they belong to.
    peak = size * (held + 2 * passing) + 2 * params
    seconds = work.seconds(on) + (2 * plain + 3 * materialised) / on.bandwidth
    passes = costs.backward_seconds(program, on) * (2 if plan.probed else 1)
    looped = on.looped_convolution if size < examples and _convolves(program) else 1.0
    rounds = examples / size
    total = examples * (seconds + passes) * looped
    total += rounds * (3 * params / on.bandwidth + on.round)
    total += max(peak - costs.CACHED, 0) / on.fresh
    return Choice(plan, size, total, peak)


def _convolves(program: Program) -> bool:
    return any(s.kind == "conv_general_dilated" for s in program.sites.values())


@functools.cache
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, number + 1) if number % d == 0)
