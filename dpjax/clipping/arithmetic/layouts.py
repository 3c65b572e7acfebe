"""How the axes of data, output and weight of a site become those of its factors."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpjax.clipping.analysis.lookups import Picking, picking
from dpjax.clipping.analysis.uses import Site
from dpjax.clipping.analysis.values import shape_of
from dpjax.clipping.arithmetic.kernels import (
    FEW_POSITIONS,
    Dense,
    Factors,
    Lookup,
    Patches,
)
from dpjax.privacy.sensitive import accumulation_dtype

_NARROW = 64
"""Offsets of a convolution kernel with fewer channels than this are joined."""


@dataclasses.dataclass(frozen=True)
class Axes:
    """Which axes are which, loops and batch excluded; ``h, t, k, n`` as in ``kernels``.

    Attributes:
        data: (h, t, k) of the data operand.
        out: (h, t, n) of the output.
        weight: (h, k, n) of the weight.
    """

    data: tuple[list[int], list[int], list[int]]
    out: tuple[list[int], list[int], list[int]]
    weight: tuple[list[int], list[int], list[int]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes H, T, K, N of the factors of one example."""

    h: int
    t: int
    k: int
    n: int


def factors(site: Site, data: Array, cotangent: Array) -> Factors:
    """Return the factors of all examples.

    Args:
        site: Where.
        data: The data operand, ``[loops..., B, *site.data_shape]``.
        cotangent: Gradient of the output, ``[loops..., B, *site.out_shape]``.
    """
    part = _factors(site, data, cotangent)
    if site.value.scale == 1:
        return part
    wide = part.right.astype(accumulation_dtype(part.right.dtype))
    return dataclasses.replace(part, right=wide * site.value.scale)


def _factors(site: Site, data: Array, cotangent: Array) -> Factors:
    if site.kind == "conv_general_dilated":
        return _conv_factors(site, data, cotangent)
    axes = _axes(site)
    inside, shared = _loop_axes(site)
    first = len(site.loops) + 1
    batch = [first - 1]

    def grouped(array: Array, h: list[int], t: list[int], k: list[int]) -> Array:
        moved = [[first + axis for axis in group] for group in (h, t, k)]
        return _merged(array, inside + moved[0], batch, shared + moved[1], moved[2])

    left = grouped(data, *axes.data)
    right = grouped(cotangent, *axes.out)
    if site.kind == "gather":
        return _lookup(site, left, right)
    side = _divided_side(site)
    if side is None:
        return Dense((left,), right)
    blocks = (site.blocks, 1) if side == "k" else (1, site.blocks)
    left, right = (
        _in_blocks(x, n, site.blocks)
        for x, n in zip((left, right), blocks, strict=True)
    )
    return Dense((left,), right)


def _divided_side(site: Site) -> str | None:
    """Return whether "k" or "n" is divided among devices, and so in blocks; None if none.

    Blocks are weights of their own, with a norm each: what devices have to exchange for
    the norm of an example is then one number of each. (Where all layers are seen at once,
    they are first of all layers.)
    """
    if site.blocks == 1 or site.kind != "dot_general" or site.loops:
        return None
    view = site.value.view
    assert view is not None
    # Loops are the first axes of the view, also of a site that is seen without them.
    lead = view.ndim - len(shape_of(site.eqn.invars[site.side]))
    for side, axes in zip("kn", _axes(site).weight[1:], strict=True):
        # Blocks are contiguous in the merged axes if the divided one is the first.
        first = lead + axes[0] if axes else None
        if first is not None and (
            (view.strides[first], view.shape[first]) == site.value.divided
        ):
            return side if view.shape[first] % site.blocks == 0 else None
    return None


def _in_blocks(array: Array, split: int, blocks: int) -> Float[Array, "H B T C"]:
    """Divide the last axis, if ``split`` is not 1, and put the blocks before H."""
    h, b, t, c = array.shape
    parts = array.reshape(h, b, t, split, c // split)
    moved = jnp.moveaxis(parts, 3, 0)
    shape = (blocks, h, b, t, c // split)
    return jnp.broadcast_to(moved, shape).reshape(blocks * h, b, t, c // split)


def _joined_blocks(site: Site, gradient: Float[Array, "... H K N"]) -> Array:
    """Undo ``_in_blocks`` in a gradient."""
    side = _divided_side(site)
    if side is None:
        return gradient
    *lead, h, k, n = gradient.shape
    parts = gradient.reshape(*lead, site.blocks, h // site.blocks, k, n)
    axis = len(lead)
    moved = jnp.moveaxis(parts, axis, axis + (1 if side == "k" else 2))
    k, n = (k * site.blocks, n) if side == "k" else (k, n * site.blocks)
    return moved.reshape(*lead, h // site.blocks, k, n)


def weight_gradient(
    site: Site, gradient: Float[Array, "... H K N"]
) -> Float[Array, "..."]:
    """Return a gradient of factors as one of the weight, ``[..., *site.weight_shape]``."""
    gradient = _joined_blocks(site, gradient)
    lead = gradient.shape[:-3]
    loops = len(site.value.loops)
    shape = site.weight_shape[loops:]
    if site.kind == "conv_general_dilated":
        split, sources = _conv_axes(site)
    else:
        axes = _axes(site)
        order = [axis for group in axes.weight for axis in group]
        split = [shape[axis] for axis in order]
        sources = [[order.index(axis)] for axis in range(len(order))]
    lead = (*lead, *site.weight_shape[:loops])
    base = len(lead)
    moved = [base + source for group in sources for source in group]
    full = gradient.reshape(*lead, *split).transpose(*range(base), *moved)
    return full.reshape(*lead, *shape)


def sizes(site: Site) -> Sizes:
    """Return the sizes of the factors of one example."""
    inside, shared = _loop_axes(site)
    h = math.prod(site.loops[i].length for i in inside)
    t = math.prod(site.loops[i].length for i in shared)
    if site.kind == "conv_general_dilated":
        spec = site.eqn.params["dimension_numbers"]
        groups = site.eqn.params["feature_group_count"]
        channels = site.out_shape[spec.out_spec[1]]
        kernel = site.weight_shape[len(site.value.loops) :]
        weight = math.prod(kernel[axis] for axis in spec.rhs_spec[1:])
        positions = math.prod(
            size for axis, size in enumerate(site.out_shape) if axis != spec.out_spec[1]
        )
        return Sizes(h * groups, t * positions, weight, channels // groups)
    axes = _axes(site)
    shape = site.weight_shape[len(site.value.loops) :]

    def size(of: Sequence[int], group: list[int]) -> int:
        return math.prod(of[axis] for axis in group)

    return Sizes(
        h * size(shape, axes.weight[0]),
        t * size(site.out_shape, axes.out[1]),
        size(shape, axes.weight[1]),
        size(shape, axes.weight[2]),
    )


def identity(site: Site) -> tuple | None:
    """Return what two sites must share for their factors to be of the same weight.

    ``(h, k, n)``: which entries of the parameter the axes walk over; with k and n
    exchanged the weight is the same, transposed. None if the weight is no view.
    """
    if site.value.view is None:
        return None
    view: np.ndarray = site.value.view
    loops = len(site.value.loops)
    start = view.__array_interface__["data"][0] if view.size else 0

    def walk(axes: Sequence[int]) -> tuple:
        return tuple(
            (view.shape[axis], view.strides[axis])
            for axis in axes
            if view.shape[axis] > 1
        )

    if site.kind == "conv_general_dilated":
        spec = site.eqn.params["dimension_numbers"].rhs_spec
        groups = site.eqn.params["feature_group_count"]
        order = [*range(loops), *(loops + axis for axis in spec)]
        return ("conv", groups, start, walk(order)), (), ()
    axes = _axes(site)
    h, k, n = ([loops + axis for axis in group] for group in axes.weight)
    return (start, walk([*range(loops), *h])), walk(k), walk(n)


def _merged(array: Array, *groups: Sequence[int]) -> Array:
    """Transpose to the concatenated groups of axes and merge each group."""
    order = [axis for group in groups for axis in group]
    shape = [math.prod(array.shape[axis] for axis in group) for group in groups]
    return array.transpose(order).reshape(shape)


def _loop_axes(site: Site) -> tuple[list[int], list[int]]:
    """Loops that the weight varies with (part of h), and others (part of t)."""
    inside = [i for i, loop in enumerate(site.loops) if loop in site.value.loops]
    shared = [i for i, loop in enumerate(site.loops) if loop not in site.value.loops]
    return inside, shared


def _axes(site: Site) -> Axes:
    if site.kind == "copy":
        whole = [*range(len(site.out_shape))]
        return Axes(data=([], [], []), out=([], [], whole), weight=([], [], whole))
    return _gather_axes(site) if site.kind == "gather" else _dot_axes(site)


def _dot_axes(site: Site) -> Axes:
    contract, batch = site.eqn.params["dimension_numbers"]
    weight, data = site.side, 1 - site.side
    data_free = _rest(len(site.data_shape), batch[data], contract[data])
    ndim = len(shape_of(site.eqn.invars[weight]))
    weight_free = _rest(ndim, batch[weight], contract[weight])
    # The output has the shared axes, then the free ones of the left, then of the right.
    shared, data_count = len(batch[0]), len(data_free)
    weight_start = shared if weight == 0 else shared + data_count
    data_start = shared + len(weight_free) if weight == 0 else shared
    return Axes(
        data=(list(batch[data]), data_free, list(contract[data])),
        out=(
            list(range(shared)),
            list(range(data_start, data_start + data_count)),
            list(range(weight_start, weight_start + len(weight_free))),
        ),
        weight=(list(batch[weight]), list(contract[weight]), weight_free),
    )


def _rest(ndim: int, *taken: Sequence[int]) -> list[int]:
    used = {axis for group in taken for axis in group}
    return [axis for axis in range(ndim) if axis not in used]


def _gather_axes(site: Site) -> Axes:
    how = _picking(site)
    indices = range(len(site.data_shape) - 1)  # The last axis holds the index vector.
    positions = _rest(len(site.out_shape), how.offset)
    free = _rest(len(indices), how.shared)
    return Axes(
        data=([*how.shared], free, [len(indices)]),
        out=(
            [positions[i] for i in how.shared],
            [positions[i] for i in free],
            [*how.offset],
        ),
        weight=([*how.batch], [*how.rows], [*how.rest]),
    )


def _picking(site: Site) -> Picking:
    how = picking(site.eqn)
    assert how is not None
    return how


def _lookup(site: Site, vectors: Array, right: Array) -> Lookup:
    how = _picking(site)
    rows, found = how.numbers(vectors)
    if how.fill:
        right = jnp.where(found[..., None], right, 0.0)
    return Lookup(rows, right, math.prod(how.table[axis] for axis in how.rows))


def _conv_factors(site: Site, data: Array, cotangent: Array) -> Patches:
    params = site.eqn.params
    spec = params["dimension_numbers"]
    inside, shared = _loop_axes(site)
    first = len(site.loops) + 1

    def spatial_last(array: Array, axes: Sequence[int]) -> Array:
        # [loops..., B, ...] -> [H, B, T, *spatial, channels]
        batch, channels, *spatial = (first + axis for axis in axes)
        groups = [inside, [first - 1], [*shared, batch], *([s] for s in spatial)]
        return _merged(array, *groups, [channels])

    x = spatial_last(data, spec.lhs_spec)
    right = spatial_last(cotangent, spec.out_spec)
    groups = params["feature_group_count"]
    out = right.shape[3:-1]

    def grouped(array: Array) -> Array:
        return array.reshape(*array.shape[:-1], groups, array.shape[-1] // groups)

    def by_group(array: Array) -> Array:
        # [H, B, T, *spatial, groups, channels] -> [H * groups, B, T', channels]
        last = array.ndim - 1
        return _merged(array, [0, last - 1], [1], range(2, last - 1), [last])

    edges = zip(params["padding"], params["lhs_dilation"], strict=True)
    whole = (0, 0, 0)
    margins = (
        [whole] * 3 + [(low, high, gap - 1) for (low, high), gap in edges] + [whole]
    )
    kernel = [shape_of(site.eqn.invars[1])[axis] for axis in spec.rhs_spec[2:]]
    steps = [*zip(params["rhs_dilation"], params["window_strides"], strict=True)]

    def shifted(image: Array, axis: int) -> list[Array]:
        (dilation, stride), size = steps[axis], out[axis]
        starts = [offset * dilation for offset in range(kernel[axis])]
        ends = [start + (size - 1) * stride + 1 for start in starts]
        return [
            jax.lax.slice_in_dim(image, start, end, stride, axis=3 + axis)
            for start, end in zip(starts, ends, strict=True)
        ]

    def joint(image: Array, axis: int) -> Array:
        return jnp.concatenate(shifted(image, axis), axis=-1)

    def windows(image: Array, axis: int) -> Array:
        # Fewer slices than by offsets where the kernel is longer than the output.
        (dilation, stride), size = steps[axis], kernel[axis]
        starts = [position * stride for position in range(out[axis])]
        cut = [
            jax.lax.slice_in_dim(
                image, start, start + (size - 1) * dilation + 1, dilation, axis=3 + axis
            )
            for start in starts
        ]
        moved = [jnp.moveaxis(window, 3 + axis, -2) for window in cut]
        return jnp.stack([x.reshape(*x.shape[:-2], -1) for x in moved], axis=3 + axis)

    def cut(image: Array) -> tuple[Array, ...]:
        few = math.prod(out) <= FEW_POSITIONS or image.shape[1] == 1
        joined = few or image.shape[-1] // groups < _NARROW
        image = grouped(jax.lax.pad(image, jnp.zeros((), image.dtype), margins))
        # Axis by axis: fewer slices to compile than there are offsets.
        blocks = [image]
        for axis in reversed(range(len(steps))):
            if axis > 0 or joined:
                few = out[axis] < kernel[axis]
                blocks = [(windows if few else joint)(blocks[0], axis)]
            else:
                blocks = shifted(blocks[0], axis)
        return tuple(by_group(block) for block in blocks)

    return Patches(x, by_group(grouped(right)), cut)


def _conv_axes(site: Site) -> tuple[list[int], list[list[int]]]:
    """Return how H, K and N split, and which of those axes make up each of the weight."""
    spec = site.eqn.params["dimension_numbers"].rhs_spec
    shape = shape_of(site.eqn.invars[1])
    out, into, *spatial = (shape[axis] for axis in spec)
    groups = site.eqn.params["feature_group_count"]
    split = [groups, *spatial, into, out // groups]
    last = len(split) - 1
    # (out, in, *spatial), in the order of the weight.
    sources = [[0, last], [last - 1], *([i] for i in range(1, last - 1))]
    return split, [sources[spec.index(axis)] for axis in range(len(spec))]
