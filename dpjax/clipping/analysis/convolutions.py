"""Which convolutions are better differentiated plainly than by patches of their images."""

import math
from typing import Final

from jax.extend.core import JaxprEqn

from dpjax.clipping.analysis.values import shape_of

_SLICES: Final = 64
"""Patches are cut by so many slices at most: a compiler takes long for more."""
_GROWTH: Final = 32
"""Patches are at most so many times as large as image, output and kernel together."""


def cuts_well(eqn: JaxprEqn) -> bool:
    """Whether patches of the image are a good way to the gradient of the kernel.

    They hold each pixel once for each offset of the kernel that reaches it, and zeros
    where the image is spread out (``lhs_dilation``).
    """
    out, spec = shape_of(eqn.outvars[0]), eqn.params["dimension_numbers"]
    image, kernel = map(shape_of, eqn.invars)
    offsets = [kernel[axis] for axis in spec.rhs_spec[2:]]
    positions = [out[axis] for axis in spec.out_spec[2:]]
    channels = image[spec.lhs_spec[1]]
    patches = math.prod(positions) * math.prod(offsets) * channels
    patches *= out[spec.out_spec[0]]
    slices = sum(map(min, offsets, positions))
    whole = sum(map(math.prod, (image, kernel, out)))
    return slices <= _SLICES and patches <= _GROWTH * whole
