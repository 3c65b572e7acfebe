"""The estimated fastest way to a clipped sum, from shapes alone."""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from dpjax.clipping.analysis.uses import Program
from dpjax.clipping.planning import costs
from dpjax.clipping.planning.costs import (
    Device,
    cut_bytes,
    group_cost,
    probe_cost,
    saved_bytes,
)
from dpjax.clipping.planning.plan import Method, Plan, can_probe, make_plan
from dpjax.clipping.planning.slots import Group, find_slots

TOLERANCE: Final = 1.1
"""Estimated times within this factor count as equal: the estimates are no better."""


class MemoryBudgetError(ValueError):
    """No plan fits the memory that is allowed."""


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
    or_more: bool = False,
    sharers: int = 1,
    on: Device | None = None,
) -> Choice:
    """Return the estimated fastest plan whose temporaries fit the budget.

    Of plans that are about as fast, with as many examples at once and as many passes, a
    leaner one is preferred if it saves twice the share of memory that it costs of time.

    Args:
        program: The analysed loss.
        examples: Size of the batch; microbatches are of sizes that divide it. Of a batch
            that devices share, that of each.
        memory_budget: Bytes, of each device.
        or_more: If no plan fits, allow a quarter more than the leanest takes; the leanest
            itself may cost twice the time for a tenth of the memory.
        sharers: Devices that share a batch and the parameters.
        on: The device; JAX's default one if None.

    Raises:
        MemoryBudgetError: No plan fits, and no more is allowed.
    """
    on = on or costs.device()
    sizes = [size for size in range(1, examples + 1) if examples % size == 0]
    choices = [
        choice
        for plan in candidates(program, on)
        for choice in estimates(program, plan, sizes, examples, on, sharers=sharers)
    ]
    least = min(choice.peak for choice in choices)
    if least > memory_budget:
        if not or_more:
            raise MemoryBudgetError(
                f"memory_budget={memory_budget:.4g} bytes is too small: the leanest plan, "
                f"one example at a time, takes up to {least:.4g}"
            )
        memory_budget = 1.25 * least
    fitting = [choice for choice in choices if choice.peak <= memory_budget]
    best = min(fitting, key=lambda choice: choice.seconds)
    equal = [
        choice
        for choice in fitting
        if choice.microbatch_size == best.microbatch_size
        and bool(choice.plan.probed) == bool(best.plan.probed)
        and choice.seconds <= TOLERANCE * best.seconds
    ]
    return min(equal, key=lambda choice: choice.seconds**2 * choice.peak)


def candidates(program: Program, on: Device) -> Iterator[Plan]:
    """Yield the plans to choose from: fast, lean, and with two backward passes.

    Three are lean. What is held until the sum is formed adds up under the first two, and
    which is less at the peak depends on what else lives then; the third drops only
    gradients that are large beside the patches of their images, and so computes fewer twice.
    """
    slots = find_slots(program)

    def lean(group: Group, method: Method) -> float:
        # What is held adds up; of what passes, only the largest counts.
        cost = group_cost(group, method)
        return cost.held + cost.passing / len(slots)

    def seconds(group: Group, method: Method) -> float:
        return group_cost(group, method).seconds(on)

    yield make_plan(slots, seconds)
    yield make_plan(slots, lean)
    yield make_plan(slots, saved_bytes)
    yield make_plan(slots, cut_bytes)
    if any(can_probe(slot) for slot in slots):
        yield make_plan(
            slots, seconds, probing=lambda group, m: probe_cost(group, m).seconds(on)
        )


def estimates(
    program: Program,
    plan: Plan,
    sizes: Sequence[int],
    examples: int,
    on: Device,
    *,
    sharers: int = 1,
) -> Iterator[Choice]:
    """Yield what a plan is expected to cost with so many examples at once."""
    cost = costs.example_cost(program, plan)
    params = costs.parameter_bytes(program)
    # Read anew by the forward and the backward pass of each microbatch.
    reread = 3 * params + 2 * costs.constant_bytes(program)
    held, moved = 2 * params, 0.0
    if sharers > 1:
        # Put together for each pass, a layer at a time; the sum is taken apart.
        held = 2 * params / sharers + 2 * costs.layer_bytes(program)
        moved = (5 if plan.probed else 3) * params / on.link
    for size in sizes:
        peak = size * cost.bytes + cost.single + held
        looped = size < examples and costs.convolves(program)
        total = examples * cost.seconds(on) * (on.looped_convolution if looped else 1.0)
        total += examples / size * (reread / on.bandwidth + on.round + moved)
        total += max(peak - costs.CACHED, 0.0) / on.fresh
        yield Choice(plan, size, total, peak)
