"""How the axes of data, output and weight of a site become those of its factors."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpjax.clipping.analysis import Site
from dpjax.clipping.kernels import (
    FEW_POSITIONS,
    Dense,
    Factors,
    Lookup,
    Patches,
)
from dpjax.clipping.values import shape_of

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
    if site.kind == "conv_general_dilated":
        return _conv_factors(site, data, cotangent)
    axes = _gather_axes(site) if site.kind == "gather" else _dot_axes(site)
    inside, shared = _loop_axes(site)
    first = len(site.loops) + 1
    batch = [first - 1]

    def grouped(array: Array, h: list[int], t: list[int], k: list[int]) -> Array:
        moved = [[first + axis for axis in group] for group in (h, t, k)]
        return _merged(array, inside + moved[0], batch, shared + moved[1], moved[2])

    left = grouped(data, *axes.data)
    right = grouped(cotangent, *axes.out)
    if site.kind == "dot_general":
        return Dense((left,), right)
    return _lookup(site, left[..., 0], right)


def weight_gradient(
    site: Site, gradient: Float[Array, "... H K N"]
) -> Float[Array, "..."]:
    """Return a gradient of factors as one of the weight, ``[..., *site.weight_shape]``."""
    lead = gradient.shape[:-3]
    shape = site.weight_shape
    loops = len(site.value.loops)
    if site.kind == "conv_general_dilated":
        order, split = _conv_order(site)
        full = gradient.reshape(*lead, *shape[:loops], *split)
        # [group, *offsets, in, out] -> [group, out, in, *offsets]
        spatial = list(range(1, len(split) - 2))
        moved = [0, len(split) - 1, len(split) - 2, *spatial]
        base = len(lead) + loops
        full = full.transpose(*range(base), *(base + axis for axis in moved))
        full = full.reshape(*full.shape[:base], -1, *full.shape[base + 2 :])
    else:
        axes = _gather_axes(site) if site.kind == "gather" else _dot_axes(site)
        order = [axis for group in axes.weight for axis in group]
        sizes = [shape[loops + axis] for axis in order]
        full = gradient.reshape(*lead, *shape[:loops], *sizes)
        base = len(lead) + loops
    inverse = [base + order.index(axis) for axis in range(len(order))]
    return full.transpose(*range(base), *inverse)


def sizes(site: Site) -> Sizes:
    """Return the sizes of the factors of one example."""
    inside, shared = _loop_axes(site)
    h = math.prod(site.loops[i].length for i in inside)
    t = math.prod(site.loops[i].length for i in shared)
    if site.kind == "conv_general_dilated":
        spec = site.eqn.params["dimension_numbers"]
        groups = site.eqn.params["feature_group_count"]
        channels = site.out_shape[spec.out_spec[1]]
        weight = math.prod(site.weight_shape) // (h * channels)
        positions = math.prod(site.out_shape) // channels
        return Sizes(h * groups, t * positions, weight, channels // groups)
    axes = _gather_axes(site) if site.kind == "gather" else _dot_axes(site)
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
    axes = _gather_axes(site) if site.kind == "gather" else _dot_axes(site)
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
    indices = len(site.data_shape) - 1  # The last axis holds the index, of length 1.
    offset = list(site.eqn.params["dimension_numbers"].offset_dims)
    positions = _rest(len(site.out_shape), offset)
    table = len(shape_of(site.eqn.invars[0]))
    return Axes(
        data=([], list(range(indices)), [indices]),
        out=([], positions, offset),
        weight=([], [0], list(range(1, table))),
    )


def _lookup(site: Site, rows: Array, right: Array) -> Lookup:
    size = shape_of(site.eqn.invars[0])[0]
    if site.eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        found = (rows >= 0) & (rows < size)
        right = jnp.where(found[..., None], right, 0.0)
    return Lookup(jnp.clip(rows, 0, size - 1), right, size)


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

    def by_group(array: Array) -> Array:
        # [H, B, T, *spatial, groups * channels] -> [H * groups, B, T', channels]
        h, b = array.shape[:2]
        split = array.reshape(h, b, -1, groups, array.shape[-1] // groups)
        return _merged(split, [0, 3], [1], [2], [4])

    edges = zip(params["padding"], params["lhs_dilation"], strict=True)
    whole = (0, 0, 0)
    margins = (
        [whole] * 3 + [(low, high, gap - 1) for (low, high), gap in edges] + [whole]
    )

    def at(image: Array, offset: tuple[int, ...]) -> Array:
        steps = zip(
            offset, params["rhs_dilation"], params["window_strides"], out, strict=True
        )
        cut = [
            slice(o * dilation, o * dilation + (size - 1) * stride + 1, stride)
            for o, dilation, stride, size in steps
        ]
        return by_group(image[(slice(None),) * 3 + tuple(cut)])

    kernel = shape_of(site.eqn.invars[1])
    offsets = [*itertools.product(*(range(kernel[axis]) for axis in spec.rhs_spec[2:]))]

    def cut(image: Array) -> tuple[Array, ...]:
        image = jax.lax.pad(image, jnp.zeros((), image.dtype), margins)
        blocks = tuple(at(image, offset) for offset in offsets)
        few = math.prod(out) <= FEW_POSITIONS or image.shape[1] == 1
        if few or blocks[0].shape[-1] < _NARROW:
            blocks = (jnp.concatenate(blocks, axis=-1),)
        return blocks

    return Patches(x, by_group(right), cut)


def _conv_order(site: Site) -> tuple[list[int], list[int]]:
    """Return the weight's axes as (out, in, *spatial), and how H, K and N split."""
    spec = site.eqn.params["dimension_numbers"].rhs_spec
    shape = shape_of(site.eqn.invars[1])
    out, into, *spatial = (shape[axis] for axis in spec)
    groups = site.eqn.params["feature_group_count"]
    return list(spec), [groups, *spatial, into, out // groups]
