"""The engine that plans for the loss that it is given."""

import jax

from dpjax.clipping.analysis.uses import analyse
from dpjax.clipping.engines.microbatched import microbatched
from dpjax.clipping.engines.vmap import vmap
from dpjax.clipping.execution.execute import run_plan
from dpjax.clipping.planning.planner import choose
from dpjax.clipping.query import Query
from dpjax.clipping.types import Engine
from dpjax.parallel.gathering import sharers
from dpjax.privacy.sensitive import ClippedSum, PerExample
from dpjax.typing import Batch, Key, Loss


def auto(
    loss: Loss, query: Query, batch: Batch, key: Key
) -> tuple[ClippedSum, PerExample]:
    """Return the clipped sum by the estimated fastest plan. See ``planned``."""
    return planned()(loss, query, batch, key)


def planned(*, memory_budget: float | None = None) -> Engine:
    """Return the engine that plans for the loss it is given.

    For each use of each parameter it chooses between Gram matrices, per-example gradients
    that are dropped and ones that are kept; for the step between one and two backward
    passes; and the number of examples at once: by the estimated time, among the plans
    whose estimated temporaries fit the budget.

    The plan follows from shapes, device kind and budget alone. Slopes need none: losses are
    evaluated for the whole batch at once.

    Args:
        memory_budget: Bytes that the temporaries of one call may take. None for half of the
            device's memory, 2 GiB where the device does not say; if no plan fits that, for
            a quarter more than the leanest takes.

    Raises:
        ValueError: The budget is not positive or, at trace time, the query is of slopes.
        MemoryBudgetError: At trace time: no plan fits the budget.
    """
    if memory_budget is not None and not memory_budget > 0:
        raise ValueError(
            f"memory_budget={memory_budget} must be a positive size in bytes"
        )

    def engine(
        loss: Loss, query: Query, batch: Batch, key: Key
    ) -> tuple[ClippedSum, PerExample]:
        if query.slope is not None:
            if memory_budget is None:
                return vmap(loss, query, batch, key)
            raise ValueError(
                f"memory_budget={memory_budget} is for plans of gradients, and this query "
                "is of slopes; use microbatch_size"
            )
        if batch.mask.shape[0] == 0:
            return vmap(loss, query, batch, key)
        program = analyse(loss, query, batch, key)
        # Each of the devices that share the rows has as many, and its own memory.
        devices = sharers()
        choice = choose(
            program,
            max(1, batch.mask.shape[0] // devices),
            memory_budget=memory_budget or default_budget(),
            or_more=memory_budget is None,
            sharers=devices,
        )
        at_once = choice.microbatch_size * devices

        def run(
            loss: Loss, query: Query, batch: Batch, key: Key
        ) -> tuple[ClippedSum, PerExample]:
            del loss
            return run_plan(program, choice.plan, query, batch, key)

        if at_once < batch.mask.shape[0]:
            run = microbatched(run, size=at_once)
        return run(loss, query, batch, key)

    return engine


def default_budget() -> float:
    """Return half of the device's memory; 2 GiB where the device does not say.

    What happens to be in use does not count: a resumed run must plan as before.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit / 2 if limit else 2**31
