"""Mechanisms: each a frozen dataclass of primary facts; everything else is derived.

Importing a mechanism does not import jax, so config errors are answered at once.
"""

from dpjax.mechanisms.base import Mechanism
from dpjax.mechanisms.dice_sgd import DiceSgd
from dpjax.mechanisms.dp_sgd import DpSgd
from dpjax.mechanisms.non_private import NonPrivate
from dpjax.mechanisms.privatized_error_feedback import PrivatizedErrorFeedback

__all__ = ["DiceSgd", "DpSgd", "Mechanism", "NonPrivate", "PrivatizedErrorFeedback"]
