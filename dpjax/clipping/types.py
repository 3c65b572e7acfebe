"""The engine contract."""

from typing import Protocol

from dpjax.clipping.query import Query
from dpjax.privacy.sensitive import ClippedSum, PerExample
from dpjax.typing import Batch, Key, Loss


class Engine(Protocol):
    """``(loss, query, batch, key) -> (ClippedSum, PerExample)``.

    With ``d_i = sum_k signs[k] grad loss(points[k]; example i)``, or the slope
    of ``Query.slope``, and clip factors ``f_i`` (see ``Query.style``; 0 on masked rows and on
    examples that are not finite)::

        total    = sum_i f_i d_i
        residual = sum_i (1 - f_i) d_i over the unmasked, finite examples, if asked
        count    = sum_i (1[|d_i| <= clip_norm] - 1/2) over the unmasked examples, if asked
    """

    def __call__(
        self, loss: Loss, query: Query, batch: Batch, key: Key, /
    ) -> tuple[ClippedSum, PerExample]:
        """Return the clipped sum over ``batch`` and private statistics."""
        ...
