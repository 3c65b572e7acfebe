"""dpjax: high-throughput differentially private training in JAX.

Names load on first use, so that config errors are answered without importing jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpjax.accounting import calibrate, epsilon
    from dpjax.clipping import ClippedGrad, Query, clipped_grad, explain
    from dpjax.data.batches import batches
    from dpjax.mechanisms import (
        AdaptiveDpSgd,
        BandMf,
        DiceSgd,
        Diff2,
        Diff2BvrLSgd,
        DpSgd,
        DpZero,
        Mechanism,
        NonPrivate,
        PrivatizedErrorFeedback,
        ScheduledDpSgd,
        SpiderBoost,
    )
    from dpjax.noise import root_key
    from dpjax.sampling import (
        CyclicPoisson,
        FullBatch,
        PeriodicPoisson,
        Poisson,
        ShuffledFixed,
        TruncatedPoisson,
        secret_seed,
    )
    from dpjax.sensitive import ClippedSum, PerExample, reveal
    from dpjax.transforms import diff2, diff2_query, error_feedback, private
    from dpjax.typing import Batch, Model

_HOMES = {
    "AdaptiveDpSgd": "mechanisms",
    "BandMf": "mechanisms",
    "Batch": "typing",
    "ClippedGrad": "clipping",
    "ClippedSum": "sensitive",
    "CyclicPoisson": "sampling",
    "DiceSgd": "mechanisms",
    "Diff2": "mechanisms",
    "Diff2BvrLSgd": "mechanisms",
    "DpSgd": "mechanisms",
    "DpZero": "mechanisms",
    "FullBatch": "sampling",
    "Mechanism": "mechanisms",
    "Model": "typing",
    "NonPrivate": "mechanisms",
    "PerExample": "sensitive",
    "PeriodicPoisson": "sampling",
    "Poisson": "sampling",
    "PrivatizedErrorFeedback": "mechanisms",
    "Query": "clipping",
    "ShuffledFixed": "sampling",
    "ScheduledDpSgd": "mechanisms",
    "SpiderBoost": "mechanisms",
    "TruncatedPoisson": "sampling",
    "batches": "data.batches",
    "calibrate": "accounting",
    "clipped_grad": "clipping",
    "diff2": "transforms",
    "diff2_query": "transforms",
    "epsilon": "accounting",
    "error_feedback": "transforms",
    "explain": "clipping",
    "private": "transforms",
    "reveal": "sensitive",
    "root_key": "noise",
    "secret_seed": "sampling",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dpjax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dpjax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
