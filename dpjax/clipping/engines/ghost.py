"""Two backward passes: norms without keeping anything, then the clipped sum."""

from dpjax.clipping.analysis.uses import Program
from dpjax.clipping.engines.by_plan import execute
from dpjax.clipping.planning import costs
from dpjax.clipping.planning.plan import Plan, make_plan
from dpjax.clipping.planning.slots import find_slots
from dpjax.clipping.query import Query
from dpjax.privacy.sensitive import ClippedSum, PerExample
from dpjax.typing import Batch, Key, Loss


def ghost(
    loss: Loss, query: Query, batch: Batch, key: Key
) -> tuple[ClippedSum, PerExample]:
    """Return the clipped sum from two backward passes over the whole batch.

    The first finds norms on the way, at each use of a parameter, and keeps nothing: under
    ``scan`` and ``remat`` memory stays that of training without privacy. The second sums.
    Parameters used more than once, or in a loop that they do not vary with, are kept as
    ``bookkeeping`` keeps them: their norm has cross terms.

    Sensitivity: ``query.clip_norm`` under add/remove-one.

    Raises:
        TypeError: The loss is not a pure function to one floating-point scalar, or a
            parameter is not floating point.

    References:
        Goodfellow, Efficient Per-Example Gradient Computations,
        https://arxiv.org/abs/1510.01799
        Li et al., Large Language Models Can Be Strong Differentially Private Learners,
        https://arxiv.org/abs/2110.05679
    """
    return execute(loss, query, batch, key, planner=_plan)


def _plan(program: Program) -> Plan:
    return make_plan(
        find_slots(program),
        costs.saved_bytes,
        probing=lambda group, method: costs.probe_cost(group, method).bytes,
    )
