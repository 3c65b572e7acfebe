"""What a guarantee rests on: who is drawn, how noise is made, sensitive types, epsilon.

Whatever a proof or an accountant quotes belongs here, and what secrets come from. What
one mechanism alone does with it does not (``mechanisms``), nor what makes clipped sums
(``clipping``). Importing this room does not import jax.
"""

from dpjax.privacy.sampling import (
    CyclicPoisson,
    FullBatch,
    PeriodicPoisson,
    Poisson,
    Sampling,
    ShuffledFixed,
    TruncatedPoisson,
)

__all__ = [
    "CyclicPoisson",
    "FullBatch",
    "PeriodicPoisson",
    "Poisson",
    "Sampling",
    "ShuffledFixed",
    "TruncatedPoisson",
]
