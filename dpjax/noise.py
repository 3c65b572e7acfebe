"""The only place that draws noise.

The root key is two independent 64-bit threefry keys, 128 bits of operating-system
entropy in all. Each normal deviate is the scaled sum of one deviate from each: to predict
the noise both keys are needed (meeting in the middle, some 2**64 work and memory), the
tails reach 7.3 standard deviations instead of 5.2, and the float32 lattice of the sum is
finer, which blunts (but does not exclude) attacks on floating-point noise (Mironov 2012).
Threefry is not a vetted cryptographic generator.

Noise is a function of (root key, step, stream, leaf): the same for every sharding, and the
same again when a step is replayed after a resume. See ``ledger.py`` for the guard that
refuses to reuse it for another sum.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.entropy import entropy
from dpjax.sensitive import ClippedSum, opened
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


def add_noise(
    tree: Params,
    *,
    key: Key,
    step: int | Scalar,
    stddev: float | Scalar,
    stream: int | Scalar = 0,
) -> Params:
    """Return ``tree`` plus N(0, stddev^2) on every coordinate.

    Args:
        tree: Pytree of float32 or float64 arrays.
        key: Root key, ``key[2]``. Never use it for two trees at the same ``step`` and
            ``stream``.
        step: Which step this is.
        stddev: In the units of ``tree``.
        stream: Tells releases of the same step apart.

    Raises:
        ValueError: ``key`` is no root key.
    """
    check_root_key("key", key)
    leaves, treedef = jax.tree.flatten(tree)
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    keys = fold_in(fold_in(key, step), stream)
    noisy = [
        leaf + stddev * _normal(keys, index, leaf) for index, leaf in enumerate(leaves)
    ]
    return treedef.unflatten(noisy)


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


def _normal(keys: Key, index: int, leaf: jax.Array) -> jax.Array:
    first, second = (
        jax.random.normal(jax.random.fold_in(key, index), leaf.shape, leaf.dtype)
        for key in keys
    )
    return (first + second) * np.asarray(np.sqrt(0.5), leaf.dtype)
