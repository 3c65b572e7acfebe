"""What numbers that are computed from a parameter add to its gradient at other sites."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpjax.clipping.analysis.uses import Program, Site
from dpjax.clipping.analysis.values import Path
from dpjax.clipping.arithmetic import layouts
from dpjax.clipping.arithmetic.kernels import Factors
from dpjax.clipping.arithmetic.multiples import Multiple, differenced
from dpjax.clipping.execution.passes import to_parameters
from dpjax.clipping.planning.slots import Group
from dpjax.privacy.sensitive import accumulation_dtype


def multiples(
    program: Program,
    leaves: Sequence[Array],
    group: Group,
    factors: Mapping[Path, Factors],
) -> list[Multiple]:
    """Return what the numbers of a group add, in the axes of its first site.

    Args:
        program: Where the group is from.
        leaves: The parameters of all points.
        group: Its sites see disjoint parts of a parameter from those of other groups.
        factors: Of the numbers' sites: what flows back into them.
    """
    points: dict[int, list[Multiple]] = {}
    for site in group.numbers:
        coefficient = jnp.sum(factors[site.path].right, axis=(0, 2, 3))
        matrix = _part(
            program, leaves, group.sites[0], _gradient(program, leaves, site)
        )
        point = min(site.value.leaves) // len(program.names)
        points.setdefault(point, []).append(Multiple(coefficient, matrix))
    lists = [*points.values()]
    if len(lists) == 2 and len(lists[0]) == len(lists[1]):
        pairs = zip(*lists, strict=True)
        return [part for pair in pairs for part in differenced(*pair)]
    return [part for parts in lists for part in parts]


def _gradient(
    program: Program, leaves: Sequence[Array], site: Site
) -> dict[int, Array]:
    """Return the gradients of a number."""
    one = jnp.ones(site.weight_shape, accumulation_dtype(leaves[0].dtype))
    return to_parameters(program, leaves, {site.path: one})


def _part(
    program: Program,
    leaves: Sequence[Array],
    site: Site,
    gradients: Mapping[int, Array],
) -> Float[Array, "H K N"]:
    """Return what a site sees of the gradient of its parameter."""
    slot = program.slot(min(site.value.leaves))
    whole, size = gradients[slot], layouts.sizes(site)

    def placed(part: Array) -> Array:
        weights = {site.path: layouts.weight_gradient(site, part)}
        return to_parameters(program, leaves, weights)[slot]

    # Entries of the parameter, each at most once: the way there and back is their place.
    like = jax.ShapeDtypeStruct((size.h, size.k, size.n), whole.dtype)
    (part,) = jax.linear_transpose(placed, like)(whole)
    return part
