"""The only place that draws noise.

The root key is two independent 64-bit threefry keys, 128 bits of operating-system
entropy in all. Each normal deviate is a weighted sum of one deviate from each: to predict
the noise both keys are needed (meeting in the middle, some 2**64 work and memory). Threefry
is not a vetted cryptographic generator.

Floating point (Mironov 2012): noise alone and noise plus one example's value are sums of
floats that lie on different lattices, so that a single coordinate to which nobody else
contributes could tell them apart for certain. Therefore whatever gets noise is rounded, in
the same breath, to a multiple of ``grid(stddev)``, a power of two between a 2048th and a
1024th of the standard deviation. The noise itself is a whole number of 65536ths of that,
made of two 32-bit words, and is added in integers: which multiple comes out is exact.
Rounding is post-processing and adds 1e-7 of the variance at most. Where a sum is so large
that its float has no room for the grid, its own spacing, a larger power of two, is what is
rounded to, after the exact addition.

How close that comes to real Gaussian noise was computed for float32 by adding up all 2**64
pairs of words, at one standard deviation, six multiples and six shifts of the sum: up to 3
standard deviations out a multiple is as probable as it has to be, and stays so under the
shifts, within 9e-7 of its probability; the shifts themselves change it by at most 4e-8 up to
2 of them: some 1e-15 nats on a coordinate, beside what a Gaussian tells.

Noise is a function of (root key, step, stream, leaf): the same for every sharding, and the
same again when a step is replayed after a resume. See ``training.ledger`` for the guard that
refuses to reuse it for another sum.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.privacy.entropy import entropy
from dpjax.privacy.sensitive import ClippedSum, opened
from dpjax.typing import Key, Params, Scalar

_IMPL = "threefry2x32"


def root_key(seed: int | None = None) -> Key:
    """Return the root noise key, ``key[2]``: from the OS, or reproducible from ``seed``.

    Noise from a written ``seed`` protects nobody; the privacy card says so.
    """
    words = np.frombuffer(entropy("noise", seed=seed), np.uint32).reshape(2, 2)
    return jax.random.wrap_key_data(jnp.asarray(words), impl=_IMPL)


def check_root_key(name: str, key: Key) -> None:
    """Raise ValueError unless ``key`` is of the kind that ``root_key`` makes.

    The values are not told, nor looked at: a public constant of that kind passes.
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", ())
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed and shape == (2,) and str(jax.random.key_impl(key)) == _IMPL):
        kind = type(key).__name__ if dtype is None else f"{dtype}{list(shape)}"
        raise ValueError(
            f"{name}={kind} must be dpjax.root_key(), two {_IMPL} keys of secret bits: "
            "whoever can guess the noise subtracts it, so a seed, or a key made from one, "
            "hides nothing"
        )


def grid(stddev: float | Scalar) -> Scalar:
    """Return the power of two, ``float32``, of which noisy values are multiples.

    It is in ``(stddev / 2048, stddev / 1024]``; 0 for no noise.
    """
    # The exponent alone: no logarithm, whose rounding may depend on the machine.
    exponent = _bits(stddev) & 0x7F800000
    return jax.lax.bitcast_convert_type(exponent, jnp.float32) / 1024


def add_noise(
    tree: Params,
    *,
    key: Key,
    step: int | Scalar,
    stddev: float | Scalar,
    stream: int | Scalar = 0,
) -> Params:
    """Return ``tree`` plus N(0, stddev^2) on every coordinate, on ``grid(stddev)``.

    Without noise (``stddev`` is 0) the tree comes back as it is; for noise so small that
    it has no grid in float32 (below 1e-35), NaN.

    Args:
        tree: Pytree of float32 or float64 arrays.
        key: Root key, ``key[2]``. Never use it for two trees at the same ``step`` and
            ``stream``.
        step: Which step this is.
        stddev: In the units of ``tree``.
        stream: Tells releases of the same step apart.

    Raises:
        ValueError: ``key`` is no root key, a leaf is of another dtype, or ``stddev`` is a
            negative number.
    """
    for leaf in jax.tree.leaves(tree):
        if leaf.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"dtype={leaf.dtype} of what gets noise must be float32 or float64: others "
                "have no room for its last bits"
            )
    if isinstance(stddev, int | float) and not stddev >= 0:
        raise ValueError(f"stddev={stddev} must be at least 0")
    # By its bits: a denormal also equals 0 where such are flushed, and has no grid.
    silent = _bits(stddev) == 0
    unit = grid(jnp.where(silent, 1, stddev))

    def noisy(leaf: jax.Array, noise: jax.Array) -> jax.Array:
        scaled = leaf / unit.astype(leaf.dtype)
        whole = jnp.floor(scaled)
        # Both parts are exact, and so is their sum but for the last bit of the fraction.
        fraction = (scaled - whole) + (noise & 0xFFFF).astype(leaf.dtype) / _FINE
        cells = (noise >> 16).astype(leaf.dtype) + jnp.round(fraction)
        rounded = (whole + cells) * unit.astype(leaf.dtype)
        return jnp.where(silent, leaf, rounded)

    return jax.tree.map(
        noisy, tree, _cells(tree, key=key, step=step, stddev=stddev, stream=stream)
    )


def noise_like(
    tree: Params,
    *,
    key: Key,
    step: int | Scalar,
    stddev: float | Scalar,
    stream: int | Scalar = 0,
) -> Params:
    """Return the noise that ``add_noise`` adds to ``tree``, before any rounding.

    It must not be added to anything that leaves a step: ``add_noise`` does that.

    Args:
        tree: What the noise is shaped like.
        key: See ``add_noise``.
        step: See ``add_noise``.
        stddev: See ``add_noise``.
        stream: See ``add_noise``.
    """
    unit = grid(stddev) / _FINE
    noise = _cells(tree, key=key, step=step, stddev=stddev, stream=stream)
    return jax.tree.map(
        lambda leaf, n: n.astype(leaf.dtype) * unit.astype(leaf.dtype), tree, noise
    )


def noisy_mean(
    clipped: ClippedSum,
    *,
    l2_bound: float | Scalar,
    stddev: float | Scalar,
    divisor: float,
    key: Key,
    step: int | Scalar,
) -> Params:
    """Return ``(total + N(0, stddev^2)) / divisor``: the Gaussian release of a sum.

    Args:
        clipped: The sum; NaN comes out if it is not intact within ``l2_bound``.
        l2_bound: Sensitivity that ``stddev`` was calibrated to.
        stddev: Of the noise on the sum.
        divisor: A public constant, such as the expected batch size.
        key: Root noise key, ``key[2]``.
        step: Which release this is.
    """
    noisy = noisy_sum(clipped, l2_bound=l2_bound, stddev=stddev, key=key, step=step)
    return jax.tree.map(lambda x: x / divisor, noisy)


def noisy_sum(
    clipped: ClippedSum,
    *,
    l2_bound: float | Scalar,
    stddev: float | Scalar,
    key: Key,
    step: int | Scalar,
    streams: range = range(1),
) -> Params:
    """Return the total plus independent N(0, stddev^2) of each of ``streams``.

    Args:
        clipped: The sum; NaN comes out if it is not intact within ``l2_bound``.
        l2_bound: Sensitivity that ``stddev`` was calibrated to.
        stddev: Of one stream: k of them have sqrt(k) times it.
        key: Root noise key, ``key[2]``.
        step: Which release this is.
        streams: Whose noise to add, as in ``add_noise``; consecutive.
    """

    def add(stream: int | Scalar, total: Params) -> Params:
        return add_noise(total, key=key, step=step, stddev=stddev, stream=stream)

    total = opened(clipped, l2_bound=l2_bound)
    if len(streams) == 1:
        return add(streams[0], total)
    return jax.lax.fori_loop(streams.start, streams.stop, add, total)


def _bits(stddev: float | Scalar) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.asarray(stddev, jnp.float32), jnp.int32)


def _cells(
    tree: Params,
    *,
    key: Key,
    step: int | Scalar,
    stddev: float | Scalar,
    stream: int | Scalar,
) -> Params:
    """Return N(0, stddev^2) in 65536ths of ``grid(stddev)``, ``int32``, like ``tree``."""
    check_root_key("key", key)
    leaves, treedef = jax.tree.flatten(tree)
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    keys = fold_in(fold_in(key, step), stream)
    # In [1024, 2048), so that noise as long as 9 standard deviations stays below 2**31.
    ratio = jnp.asarray(stddev, jnp.float32) / grid(stddev)

    def noise(index: int, leaf: jax.Array) -> jax.Array:
        first, second = (
            (ratio * (_FINE * share) * _deviates(key, index, leaf.shape)).astype(
                jnp.int32
            )
            for key, share in zip(keys, _SHARES, strict=True)
        )
        return first + second

    return treedef.unflatten([noise(index, leaf) for index, leaf in enumerate(leaves)])


_FINE = 65536.0
_SHARES = (math.cos(0.7), math.sin(0.7))
"""Parts of the two keys: their squares add up to 1. They are not alike, and no ratio of
small numbers, so that the gaps between the floats of one fall on those of the other."""

# Of the quantile over (1 - 2 p), for p to 2**-33: fitted by us to 1e-7, in w - 2.5 below
# w = 5 and in sqrt(w) - 3.4 above. The variable is that of Giles 2010, "Approximating the
# erfinv function".
_CENTRE = (
    *(3.95832098e-08, 4.85179102e-07, -4.98119461e-06, -6.20788034e-06),
    *(0.000309115094, -0.00177304174, -0.00590812991, 0.348802685, 2.12331356),
)
_TAIL = (
    *(6.01098488e-05, -2.52402841e-05, -0.000448326834, 0.00102713385),
    *(-0.00137891828, 0.00204706971, -0.00365140143, 0.00562783017, 1.4236141),
    *(4.57467467,),
)


def _deviates(key: Key, index: int, shape: tuple[int, ...]) -> jax.Array:
    """Return standard normal deviates, ``float32``, of 32 random bits each.

    One bit is the sign, 31 say how far out in that tail, down to 2**-33: to 6.3 standard
    deviations, where ``jax.random.normal`` takes 23 bits and ends at 5.2.
    """
    bits = jax.random.bits(jax.random.fold_in(key, index), shape, jnp.uint32)
    tail = ((bits >> 1).astype(jnp.float32) + 0.5) * 2.0**-32
    w = -jnp.log(4 * tail * (1 - tail))
    size = (1 - 2 * tail) * jnp.where(
        w < 5, _polynomial(_CENTRE, w - 2.5), _polynomial(_TAIL, jnp.sqrt(w) - 3.4)
    )
    return jnp.where(bits & 1 == 1, size, -size)


def _polynomial(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    return functools.reduce(lambda total, c: total * x + c, coefficients, 0 * x)
