"""Mechanisms: each a frozen dataclass of primary facts; everything else is derived.

A plan, its accounting and its release belong here; draws, noise and accountants do not
(``privacy``). Importing a mechanism does not import jax, so config errors are answered at
once.
"""

from dpjax.mechanisms.adaptive_dp_sgd import AdaptiveDpSgd
from dpjax.mechanisms.band_mf import BandMf
from dpjax.mechanisms.base import Mechanism
from dpjax.mechanisms.dice_sgd import DiceSgd
from dpjax.mechanisms.diff2 import Diff2
from dpjax.mechanisms.diff2_bvr_l_sgd import Diff2BvrLSgd
from dpjax.mechanisms.dp_sgd import DpSgd
from dpjax.mechanisms.dp_zero import DpZero
from dpjax.mechanisms.non_private import NonPrivate
from dpjax.mechanisms.privatized_error_feedback import PrivatizedErrorFeedback
from dpjax.mechanisms.scheduled_dp_sgd import ScheduledDpSgd
from dpjax.mechanisms.spider_boost import SpiderBoost

__all__ = [
    "AdaptiveDpSgd",
    "BandMf",
    "DiceSgd",
    "Diff2",
    "Diff2BvrLSgd",
    "DpSgd",
    "DpZero",
    "Mechanism",
    "NonPrivate",
    "PrivatizedErrorFeedback",
    "ScheduledDpSgd",
    "SpiderBoost",
]
