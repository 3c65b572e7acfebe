"""One backward pass: norms and the clipped sum from saved inputs and output gradients."""

from dpjax.clipping.analysis.uses import Program
from dpjax.clipping.engines.by_plan import execute
from dpjax.clipping.planning.costs import saved_bytes
from dpjax.clipping.planning.plan import Plan, make_plan
from dpjax.clipping.planning.slots import find_slots
from dpjax.clipping.query import Query
from dpjax.privacy.sensitive import ClippedSum, PerExample
from dpjax.typing import Batch, Key, Loss


def bookkeeping(
    loss: Loss, query: Query, batch: Batch, key: Key
) -> tuple[ClippedSum, PerExample]:
    """Return the clipped sum from one backward pass over the whole batch.

    The inputs and output gradients of every use of a parameter are kept until the norms are
    known; then one contraction for each use gives the weighted sum. Where a per-example
    gradient is smaller than these, it is kept instead.

    Sensitivity: ``query.clip_norm`` under add/remove-one.

    Raises:
        TypeError: The loss is not a pure function to one floating-point scalar, or a
            parameter is not floating point.

    References:
        Bu et al., Differentially Private Optimization on Large Model at Small Cost,
        https://arxiv.org/abs/2210.00038
    """
    return execute(loss, query, batch, key, planner=_plan)


def _plan(program: Program) -> Plan:
    return make_plan(find_slots(program), saved_bytes)
