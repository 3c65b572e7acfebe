"""Clipped per-example gradient sums: one contract, several engines."""

from dpjax.clipping.auto import auto, planned
from dpjax.clipping.bookkeeping import bookkeeping
from dpjax.clipping.clipped_grad import (
    ENGINES,
    ClippedGrad,
    clipped_grad,
    resolve_engine,
)
from dpjax.clipping.explain import explain
from dpjax.clipping.ghost import ghost
from dpjax.clipping.microbatched import microbatched
from dpjax.clipping.plain import plain
from dpjax.clipping.query import Query, Slope
from dpjax.clipping.types import Engine
from dpjax.clipping.vmap import vmap

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
