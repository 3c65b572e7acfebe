"""Strategies of correlated noise: banded lower-triangular Toeplitz matrices.

A strategy C of b bands is given by the b entries of its first column that are not zero,
scaled to L2 norm 1. Noise ``C^{-1} z`` on vectors x releases as much as noise z on ``C x``,
and the error it makes in the sum of the first t releases is row t of ``A C^{-1} z``, with A
the lower-triangular matrix of ones.

This module may not import jax: strategies are numbers of the plan.
"""

import functools
from typing import Literal, get_args

import numpy as np

Strategy = Literal["mean_error", "square_root"]


def check_strategy(strategy: str) -> None:
    """Raise ValueError for a strategy that does not exist."""
    if strategy not in get_args(Strategy):
        raise ValueError(
            f"strategy={strategy!r} is unknown; use one of {', '.join(get_args(Strategy))}"
        )


@functools.lru_cache(maxsize=64)
def strategy_column(strategy: Strategy, *, bands: int, steps: int) -> np.ndarray:
    """Return the first column of C, ``float64[bands]``, read-only.

    It is positive and falls, so that ``1/c(x)`` has its poles outside of the unit circle:
    the recursion that makes the noise is stable. Its norm is 1.

    Args:
        strategy: "square_root": the first entries of the square root of A, ``binom(2j, j) /
            4^j`` (Fichtenberger et al. 2022, arXiv 2202.11205); with ``bands=steps`` no
            Toeplitz strategy has a smaller largest error (Dvijotham et al. 2024, arXiv
            2404.16706). "mean_error": what makes the mean over steps of the squared error
            least (McKenna 2024, arXiv 2405.15913; the parameters searched are ours).
        bands: b.
        steps: Rows of A; only "mean_error" depends on them.
    """
    order = np.arange(1, bands)
    ratios = (2 * order - 1) / (2 * order)
    if strategy == "mean_error" and bands > 1:
        ratios = _least_mean_error(ratios, steps)
    column = np.concatenate([[1.0], np.cumprod(ratios)])
    column /= np.linalg.norm(column)
    column.setflags(write=False)
    return column


def prefix_errors(column: np.ndarray, *, steps: int) -> np.ndarray:
    """Return the variance of the error in the sum of the first t releases.

    Args:
        column: First column of C, ``[b]``.
        steps: How many t, from 1 on.

    Returns:
        ``float64[steps]``, per coordinate, for z of variance 1; ``1, 2, 3, ...`` for
        independent noise.
    """
    return np.cumsum(np.square(np.cumsum(_inverse(column, steps))))


def _inverse(column: np.ndarray, steps: int) -> np.ndarray:
    """Return the first column of C^{-1}, ``[steps]``."""
    from scipy import signal

    impulse = np.zeros(steps)
    impulse[0] = 1.0
    return np.asarray(signal.lfilter([1.0], column, impulse))


def _least_mean_error(start: np.ndarray, steps: int) -> np.ndarray:
    """Return the ratios ``c[j] / c[j - 1]`` in (0, 1] with the least mean error.

    The error is scaled to columns of norm 1. Ratios, because bounds on them keep the
    search where the recursion is stable.
    """
    from scipy import optimize, signal

    weights = np.arange(steps, 0, -1) / steps  # of how many sums an entry is a part

    def log_error(ratios: np.ndarray) -> tuple[float, np.ndarray]:
        column = np.concatenate([[1.0], np.cumprod(ratios)])
        inverse = _inverse(column, steps)
        row = np.cumsum(inverse)  # of A C^{-1}
        error, square = weights @ row**2, column @ column
        # d row / d c[j] is -row * inverse, shifted by j.
        change = signal.fftconvolve(row, inverse)[:steps]
        pull = weights * row
        shifted = [pull[j:] @ change[: steps - j] for j in range(1, len(column))]
        slopes = -2 * np.array(shifted) / error + 2 * column[1:] / square
        # c[j] is a product of the first j ratios.
        by_log = (slopes * column[1:])[::-1].cumsum()[::-1]
        return float(np.log(error * square)), by_log / ratios

    found = optimize.minimize(
        log_error,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(1e-3, 1.0)] * len(start),
        options={"maxiter": 500, "ftol": 1e-13, "gtol": 1e-8},
    )
    return found.x
