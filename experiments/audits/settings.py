"""Small plans of every mechanism and sampling: what the audit's own tests attack.

To audit a new mechanism: register its view (``dpjax.mechanisms.adversary.views``) and add it
here.
"""

import dataclasses
from typing import NamedTuple

import optax

from dpjax.audit.referee import Sampled
from dpjax.mechanisms import (
    AdaptiveDpSgd,
    BandMf,
    DiceSgd,
    Diff2,
    Diff2BvrLSgd,
    DpSgd,
    DpZero,
    Mechanism,
    PrivatizedErrorFeedback,
    ScheduledDpSgd,
    SpiderBoost,
)
from dpjax.privacy.sampling import (
    CyclicPoisson,
    FullBatch,
    PeriodicPoisson,
    Poisson,
    ShuffledFixed,
    TruncatedPoisson,
)

_PLAN = {"steps": 6, "num_examples": 16, "delta": 1e-3}
_POISSON = Poisson(rate=0.3)
_PERIODIC = PeriodicPoisson(period=3, first_rate=0.6, rate=0.2)
_SHUFFLED = ShuffledFixed(batch_size=8)
_FULL = FullBatch()

_SGD = DpSgd(
    clip_norm=0.5, clip_style="flat", noise_multiplier=1.5, sampling=_POISSON, **_PLAN
)
_DICE = DiceSgd(
    clip_norm=0.5,
    clip_style="flat",
    error_clip_norm=0.5,
    error_scale="sum",
    outer_norm=None,
    noise_multiplier=2.5,
    sampling=_FULL,
    **_PLAN,
)
_OUTER = dataclasses.replace(
    _DICE,
    error_clip_norm=None,
    outer_norm=2.0,
    noise_multiplier=1.5,
    sampling=_POISSON,
    accounting="outer_clip",
)
_TAKES_PART = dataclasses.replace(
    _DICE, noise_multiplier=1.5, sampling=_SHUFFLED, accounting="k_participation"
)
_TWO_CHANNELS = PrivatizedErrorFeedback(
    clip_norm=0.5,
    outer_norm=2.0,
    noise_multiplier=1.5,
    residual_share=0.4,
    memory_rate=0.3,
    sampling=_POISSON,
    **_PLAN,
)
_DIFF2 = Diff2(
    clip_norm=0.5,
    difference_clip_norm=2.0,
    restart_every=3,
    noise_multiplier=3.0,
    noise_ratio=1.5,
    noisy_workers=1,
    sampling=_FULL,
    **_PLAN,
)
_SPIDER = SpiderBoost(
    clip_norm=0.5,
    difference_clip_norm=0.7,
    noise_multiplier=1.5,
    noise_ratio=1.0,
    sampling=_PERIODIC,
    **_PLAN,
)

_BANDS = BandMf(
    clip_norm=0.5,
    clip_style="flat",
    noise_multiplier=1.5,
    bands=3,
    strategy="square_root",
    sampling=CyclicPoisson(cycle=3, rate=0.5),
    **_PLAN,
)
_ZERO = DpZero(
    clip_norm=0.5,
    smoothing=0.1,
    direction_seed=0,
    noise_multiplier=1.5,
    sampling=_POISSON,
    **_PLAN,
)
_ADAPTIVE = AdaptiveDpSgd(
    initial_clip_norm=0.5,
    min_clip_norm=1e-3,
    max_clip_norm=1e3,
    target_quantile=0.5,
    clip_learning_rate=0.2,
    count_share=0.3,
    noise_multiplier=1.5,
    sampling=_POISSON,
    **_PLAN,
)
_SCHEDULED = ScheduledDpSgd(
    clip_schedule=optax.linear_schedule(1.0, 0.5, 10),
    noise_schedule=optax.linear_schedule(0.8, 1.6, 10),
    noise_multiplier=1.5,
    sampling=_POISSON,
    **_PLAN,
)
_LOCAL = Diff2BvrLSgd(
    clip_norm=0.5,
    difference_clip_norm=0.7,
    local_clip_norm=0.9,
    restart_every=2,
    noise_multiplier=2.0,
    noise_ratio=1.5,
    local_noise_ratio=1.0,
    sampling=PeriodicPoisson(period=2, first_rate=1.0, rate=0.2),
    **_PLAN,
)

SETTINGS: dict[str, Mechanism] = {
    "DpSgd, Poisson": _SGD,
    "DpSgd, Poisson, rare": dataclasses.replace(
        _SGD, sampling=Poisson(rate=0.05), noise_multiplier=0.8, steps=12
    ),
    "DpSgd, Poisson, automatic": dataclasses.replace(_SGD, clip_style="automatic"),
    "DpSgd, Poisson, per layer": dataclasses.replace(_SGD, clip_style="per_layer"),
    "DpSgd, full batch": dataclasses.replace(
        _SGD, sampling=_FULL, noise_multiplier=4.0
    ),
    "DpSgd, truncated": dataclasses.replace(
        _SGD, sampling=TruncatedPoisson(rate=0.3, capacity=8), noise_multiplier=2.5
    ),
    "DpSgd, truncated at the mean": dataclasses.replace(
        _SGD, sampling=TruncatedPoisson(rate=0.3, capacity=5), noise_multiplier=2.5
    ),
    "DpSgd, shuffled": dataclasses.replace(_SGD, sampling=_SHUFFLED),
    "DpSgd, shuffled, one epoch": dataclasses.replace(
        _SGD, sampling=ShuffledFixed(batch_size=4), steps=4, noise_multiplier=1.0
    ),
    "DpSgd, periodic": dataclasses.replace(_SGD, sampling=_PERIODIC),
    "DiceSgd, conservative, full batch": _DICE,
    "DiceSgd, conservative, clipped first": dataclasses.replace(_DICE, outer_norm=3.0),
    "DiceSgd, conservative, means": dataclasses.replace(
        _DICE, error_clip_norm=0.1, error_scale="mean"
    ),
    "DiceSgd, conservative, Poisson": dataclasses.replace(
        _DICE, sampling=_POISSON, noise_multiplier=12.0, steps=40
    ),
    "DiceSgd, outer clip": _OUTER,
    "DiceSgd, outer clip, full batch": dataclasses.replace(
        _OUTER, sampling=_FULL, noise_multiplier=4.0
    ),
    "DiceSgd, outer clip, shuffled": dataclasses.replace(_OUTER, sampling=_SHUFFLED),
    "DiceSgd, k participation": _TAKES_PART,
    "DiceSgd, k participation, clipped first": dataclasses.replace(
        _TAKES_PART, outer_norm=1.0
    ),
    "DiceSgd, k participation, full batch": dataclasses.replace(
        _TAKES_PART, sampling=_FULL
    ),
    "PrivatizedErrorFeedback": _TWO_CHANNELS,
    "PrivatizedErrorFeedback, shuffled": dataclasses.replace(
        _TWO_CHANNELS, sampling=_SHUFFLED
    ),
    "Diff2": _DIFF2,
    "Diff2, noisy workers": dataclasses.replace(_DIFF2, noisy_workers=4),
    "SpiderBoost": _SPIDER,
    "SpiderBoost, capped radius": dataclasses.replace(
        _SPIDER, difference_clip_norm=5.0, noise_ratio=1.3
    ),
    "Diff2BvrLSgd": _LOCAL,
    "BandMf": _BANDS,
    "BandMf, fixed order": dataclasses.replace(
        _BANDS, sampling=CyclicPoisson(cycle=3, rate=1.0), strategy="mean_error"
    ),
    "DpZero": _ZERO,
    "AdaptiveDpSgd": _ADAPTIVE,
    "ScheduledDpSgd": _SCHEDULED,
}

_PAPER = dataclasses.replace(
    _DICE,
    sampling=Poisson(rate=0.1),
    noise_multiplier=1.5,
    steps=30,
    accounting="paper",
    accept_unproven_epsilon=True,
)

FALSE: dict[str, Mechanism] = {
    "DiceSgd, paper, any gradient": _PAPER,
    "DiceSgd, paper, gradients up to 10 C1": dataclasses.replace(
        _PAPER, outer_norm=5.0, error_clip_norm=1.5
    ),
    "DiceSgd, paper, full batch": dataclasses.replace(_PAPER, sampling=_FULL, steps=6),
}
"""Claims known to be false; see ``DiceSgd``."""


class Published(NamedTuple):
    """A run whose epsilon was published as 8 (EW-Tune, arXiv 2210.15042).

    Task of GLUE, batch, delta, steps and noise multiplier are from the logs of
    star-ailab/LLM_Tune (ebe3b2b); batches are taken to be Poisson, as its authors do. PLD of
    dp_accounting, rounded down and up, says that epsilon is from ``low`` to ``high``.
    """

    task: str
    batch: int
    delta: float
    steps: int
    noise_multiplier: float
    low: float
    high: float

    @property
    def sampled(self) -> Sampled:
        """What its accountant was told."""
        rate = self.batch / _EXAMPLES[self.task]
        return Sampled(rate, self.noise_multiplier, self.steps)


_EXAMPLES = {"MNLI": 392702, "QQP": 363846, "QNLI": 104743, "SST-2": 67349}

EW_TUNE = (
    Published("MNLI", 2000, 1e-5, 3920, 0.557, 9.04, 9.14),
    Published("MNLI", 2000, 1e-6, 3920, 0.573, 9.50, 9.60),
    Published("QQP", 2000, 1e-5, 3620, 0.5635, 9.01, 9.10),
    Published("QQP", 2000, 1e-6, 3620, 0.580, 9.45, 9.54),
    Published("QNLI", 2000, 1e-5, 1040, 0.711, 8.43, 8.46),
    Published("QNLI", 2000, 1e-6, 1040, 0.7395, 8.69, 8.71),
    Published("QNLI", 4000, 1e-5, 520, 0.842, 8.19, 8.20),
    Published("SST-2", 2000, 1e-5, 660, 0.7865, 8.27, 8.29),
    Published("SST-2", 2000, 1e-4, 660, 0.747, 8.01, 8.02),
    Published("SST-2", 1000, 1e-4, 1340, 0.646, 8.18, 8.21),
)
