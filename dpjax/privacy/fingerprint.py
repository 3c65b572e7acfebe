"""Checksums of arrays, computed where the arrays live.

A fingerprint detects corruption and change. It is not cryptographic: it stops accidents,
not forgery.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt32


def fingerprint(array: Array) -> UInt32[Array, ""]:
    """Return the checksum of one array's bits (a key array counts as its key data).

    Independent of sharding: every 32-bit word is mixed with its position, and the words
    are summed modulo 2**32. Any change within one word changes the result.
    """
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    words = _words(array)
    return jnp.sum(_mix(words ^ _mix(_position(words.shape))), dtype=jnp.uint32)


def combined_fingerprint(tree: PyTree[Array]) -> UInt32[Array, ""]:
    """Return one checksum for all leaves, in order."""
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        total = _mix(total) ^ fingerprint(leaf)
    return total


def _position(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Return the position of each word; not by a reshape, which would not be sharded."""
    position = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        position = position * jnp.uint32(size) + along
    return position


def _words(array: Array) -> UInt32[Array, "..."]:
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    bits = jax.lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize])
    return bits.astype(jnp.uint32)


_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def _mix(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    # A bijection of 32-bit words (the finaliser of MurmurHash3).
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
