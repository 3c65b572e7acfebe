"""Analyse, plan, run: what engines are that differ in their plans alone."""

from dpjax.clipping.analysis.uses import analyse
from dpjax.clipping.engines.vmap import vmap
from dpjax.clipping.execution.execute import run_plan
from dpjax.clipping.planning.plan import Planner
from dpjax.clipping.query import Query
from dpjax.privacy.sensitive import ClippedSum, PerExample
from dpjax.typing import Batch, Key, Loss


def execute(
    loss: Loss, query: Query, batch: Batch, key: Key, *, planner: Planner
) -> tuple[ClippedSum, PerExample]:
    """Return the clipped sum, computed as ``planner`` decides. See ``Engine``."""
    if query.slope is not None or batch.mask.shape[0] == 0:
        return vmap(loss, query, batch, key)
    program = analyse(loss, query, batch, key)
    return run_plan(program, planner(program), query, batch, key)
