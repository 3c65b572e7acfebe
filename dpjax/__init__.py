"""dpjax: high-throughput differentially private training in JAX.

Names load on first use, so that config errors are answered without importing jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from dpjax.privacy.accounting import calibrate, epsilon
    from dpjax.privacy.noise import root_key
    from dpjax.privacy.sampling import (
        CyclicPoisson,
        FullBatch,
        PeriodicPoisson,
        Poisson,
        ShuffledFixed,
        TruncatedPoisson,
        secret_seed,
    )
    from dpjax.privacy.sensitive import ClippedSum, PerExample, reveal
    from dpjax.transforms import diff2, diff2_query, error_feedback, private
    from dpjax.typing import Batch, Model

_HOMES = {
    "AdaptiveDpSgd": "mechanisms",
    "BandMf": "mechanisms",
    "Batch": "typing",
    "ClippedGrad": "clipping",
    "ClippedSum": "privacy.sensitive",
    "CyclicPoisson": "privacy.sampling",
    "DiceSgd": "mechanisms",
    "Diff2": "mechanisms",
    "Diff2BvrLSgd": "mechanisms",
    "DpSgd": "mechanisms",
    "DpZero": "mechanisms",
    "FullBatch": "privacy.sampling",
    "Mechanism": "mechanisms",
    "Model": "typing",
    "NonPrivate": "mechanisms",
    "PerExample": "privacy.sensitive",
    "PeriodicPoisson": "privacy.sampling",
    "Poisson": "privacy.sampling",
    "PrivatizedErrorFeedback": "mechanisms",
    "Query": "clipping",
    "ShuffledFixed": "privacy.sampling",
    "ScheduledDpSgd": "mechanisms",
    "SpiderBoost": "mechanisms",
    "TruncatedPoisson": "privacy.sampling",
    "batches": "data.batches",
    "calibrate": "privacy.accounting",
    "clipped_grad": "clipping",
    "diff2": "transforms",
    "diff2_query": "transforms",
    "epsilon": "privacy.accounting",
    "error_feedback": "transforms",
    "explain": "clipping",
    "private": "transforms",
    "reveal": "privacy.sensitive",
    "root_key": "privacy.noise",
    "secret_seed": "privacy.sampling",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dpjax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dpjax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
