"""Clipped per-example gradient sums: one contract, several engines.

What leads from a loss and a batch to a clipped sum belongs here; noise does not
(``privacy``), nor what a sum is for (``mechanisms``).
"""

from dpjax.clipping.clipped_grad import (
    ENGINES,
    ClippedGrad,
    clipped_grad,
    resolve_engine,
)
from dpjax.clipping.engines.auto import auto, planned
from dpjax.clipping.engines.bookkeeping import bookkeeping
from dpjax.clipping.engines.ghost import ghost
from dpjax.clipping.engines.microbatched import microbatched
from dpjax.clipping.engines.plain import plain
from dpjax.clipping.engines.vmap import vmap
from dpjax.clipping.explain import explain
from dpjax.clipping.query import Query, Slope
from dpjax.clipping.types import Engine

__all__ = [
    "ENGINES",
    "ClippedGrad",
    "Engine",
    "Query",
    "Slope",
    "auto",
    "bookkeeping",
    "clipped_grad",
    "explain",
    "ghost",
    "microbatched",
    "plain",
    "planned",
    "resolve_engine",
    "vmap",
]
