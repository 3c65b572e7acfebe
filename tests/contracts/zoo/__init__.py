"""Losses that exercise every rule of the fast engines, and losses that try to break them.

``ZOO[name]()`` builds a ``Case``. Each says, parameter by parameter, how its per-example
norm can be computed:

- ``dense``, ``conv``, ``embedding``: it meets data in one use (or in several uses of slices
  that do not overlap), through views only: in a dot_general, as the kernel of a convolution,
  as a table whose whole rows are picked. A weight shared by the steps of a scan is one use.
- ``tied``: several such uses of the same entries, so that cross terms count.
- ``elementwise``: biases, scales, tokens, and whatever else meets data entry by entry and is
  no larger than what comes out: per-example gradients are cheap.
- ``derived``: what meets data is a function of parameters that is no view.
- ``fallback``: no rule; per-example gradients are formed though they may be large.
- ``dense+elementwise``: parts of it one way and parts the other way.
- ``dense+number``, ``conv+number``, ...: beside that, a number that is computed from it, such
  as a penalty, meets data.
- ``frozen``, ``unused``: the gradient is zero; with or without a trace in the jaxpr.

Most cases are written as ``@case({name: rule and shape}, {name: data})`` above the loss. The
sizes of dimensions differ where they can, so that a mix-up fails; in cases named ``all_equal``
they are all the same (the batch's too), so that a mix-up is not saved by a shape error.

A loss goes into the file of its kind; ``cases`` holds what they are written with.
"""

from tests.contracts.zoo import (  # noqa: F401
    attention,
    calls,
    constants,
    containers,
    convolutions,
    dense,
    derived,
    dtypes,
    elementwise,
    lookups,
    loops,
    mixed,
    modules,
    parts,
    recurrent,
    shared,
    views,
)
from tests.contracts.zoo.cases import ZOO

__all__ = ["ZOO"]
