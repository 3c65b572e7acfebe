"""Where arrays live: a mesh of devices, rules for parameters, rows of batches.

The mesh has two axes. Rows of a batch are spread over all devices, ``data`` x ``fsdp``.
Parameters, and everything in the state that is like them, are split over ``fsdp`` as rules
say, and repeated over ``data``.

A clipped sum is formed without communication: each device runs the engine on its rows, with
the whole parameters, and adds to a partial sum of its own. One reduction, after the last
chunk of a step, makes one sum of them (``ClippedSum.merged``).
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from dpjax.models.partition import name_of
from dpjax.typing import Batch, Params

AXES = ("data", "fsdp")
_ROWS = PartitionSpec(AXES)
_WHOLE = PartitionSpec()

Rule = tuple[str, int | str | None]
"""A regular expression, searched for in names such as ``block/kernel``, and which dimension
of the parameters it finds is split: its number, "largest" (the largest that can be split
evenly, if any), or None."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and the rules that split parameters over it. Made by ``make_layout``."""

    mesh: Mesh
    rules: tuple[Rule, ...]

    @property
    def devices(self) -> int:
        """How many devices take part."""
        return self.mesh.size

    def __str__(self) -> str:
        """Return all that decides how sums are rounded, without spaces."""
        kind = self.mesh.devices.flat[0].device_kind.replace(" ", "_")
        data, fsdp = self.mesh.devices.shape
        return f"{data}x{fsdp}/{jax.process_count()}/{kind}"

    @property
    def by_row(self) -> NamedSharding | None:
        """The sharding of what has one row, or one partial sum, for each device."""
        return self._named(_ROWS)

    @property
    def whole(self) -> NamedSharding | None:
        """The sharding of what every device has."""
        return self._named(_WHOLE)

    def of_params(self, params: Params) -> PyTree | None:
        """Return the sharding of each parameter; None on one device.

        Args:
            params: Arrays or their shapes.

        Raises:
            ValueError: A parameter is matched by no rule, or cannot be split as it says.
        """
        if self.devices == 1:
            return None
        return jax.tree.map_with_path(
            lambda path, leaf: self._named(self._spec(name_of(path), leaf.shape)),
            params,
        )

    def of_state(self, state: PyTree, params: Params) -> PyTree | None:
        """Return the sharding of each leaf of a state; None on one device.

        A leaf whose path and shape end like those of a parameter is placed like it:
        moments, averages, error memories, past noises. All others are repeated.
        """
        if self.devices == 1:
            return None
        known = {
            jax.tree_util.keystr(path): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        }
        names = {
            jax.tree_util.keystr(path): name_of(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        }

        def sharding(path: Any, leaf: Any) -> NamedSharding | None:
            text = jax.tree_util.keystr(path)
            ends = [end for end in known if text.endswith(end)]
            like = max(ends, key=len, default=None)
            # Every path ends like that of a single array, which has none; a seed is no
            # parameter.
            if like is None or not jnp.issubdtype(leaf.dtype, jnp.inexact):
                return self.whole
            leading = len(leaf.shape) - len(known[like])
            if leading < 0 or known[like] != leaf.shape[leading:]:
                return self.whole
            spec = self._spec(names[like], known[like])
            return self._named(
                PartitionSpec(*(None,) * leading, *spec) if spec else _WHOLE
            )

        return jax.tree.map_with_path(sharding, state)

    def put(self, state: PyTree, params: Params) -> PyTree:
        """Place a state that every process holds with the same values."""
        shardings = self.of_state(state, params)
        if shardings is None:
            return state
        return jax.jit(lambda tree: tree, out_shardings=shardings)(state)

    def keep(self, state: PyTree, params: Params) -> PyTree:
        """Inside a compiled function: leave a state where ``put`` has placed it."""
        shardings = self.of_state(state, params)
        if shardings is None:
            return state
        return jax.lax.with_sharding_constraint(state, shardings)

    def rows(self, size: int) -> np.ndarray | None:
        """Return which of ``size`` rows are this process's to read; None for all."""
        if self.by_row is None or jax.process_count() == 1:
            return None
        slices = self.by_row.addressable_devices_indices_map((size,)).values()
        return np.unique(np.concatenate([np.arange(size)[index] for index in slices]))

    def place(self, batch: Batch, size: int) -> Batch:
        """Spread a batch of ``size`` rows, of which ``batch`` holds this process's."""
        if self.by_row is None:
            return batch

        def spread(local: np.ndarray) -> jax.Array:
            return jax.make_array_from_process_local_data(
                self.by_row, local, (size, *local.shape[1:])
            )

        return jax.tree.map(spread, batch)

    def on_each(self, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Return ``function(shared, split)`` as run on each device, without communication.

        Each gets the whole of ``shared`` and its rows of ``split``; what they return is
        stacked along the rows.
        """
        if self.devices == 1:
            return function
        # With check_vma=True, parameters that all devices share would make every gradient
        # inside a sum over all devices, before it is clipped: see
        # tests/parallel/test_sharding.py.
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(_WHOLE, _ROWS),
            out_specs=_ROWS,
            check_vma=False,
        )

    def _named(self, spec: PartitionSpec) -> NamedSharding | None:
        # One device needs no placement, and is faster without.
        return None if self.devices == 1 else NamedSharding(self.mesh, spec)

    def _spec(self, name: str, shape: tuple[int, ...]) -> PartitionSpec:
        parts = self.mesh.shape["fsdp"]
        for pattern, dimension in self.rules:
            if re.search(pattern, name):
                spec = _split(name, shape, pattern, dimension, parts)
                # Split in one part and not split are the same to XLA, but not to jit.
                return spec if parts > 1 else _WHOLE
        raise ValueError(
            f"no rule is for the parameter {name!r}; end with ('.*', None) to repeat "
            "all others on every device"
        )


def make_layout(
    *, data: int | None, fsdp: int, rules: Sequence[Sequence[Any]]
) -> Layout:
    """Return the layout of a mesh of ``data`` x ``fsdp`` devices.

    Args:
        data: Devices along "data"; None for as many as there are.
        fsdp: Devices that share one copy of the parameters.
        rules: See ``Rule``; the first that matches counts.

    Raises:
        ValueError: There are not as many devices, or some processes have more than others.
            One process may use fewer than it has.
    """
    found = jax.device_count()
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        listed = ", ".join(str(counts[process]) for process in sorted(counts))
        raise ValueError(f"the processes have {listed} devices; give each as many")
    if data is None:
        if found % fsdp:
            raise ValueError(f"fsdp={fsdp} does not divide the {found} devices")
        data = found // fsdp
    wanted = data * fsdp
    if wanted > found or (wanted < found and jax.process_count() > 1):
        processes = jax.process_count()
        raise ValueError(
            f"data={data} x fsdp={fsdp} needs {wanted} devices, and there are {found}"
            + (f" in {processes} processes" if processes > 1 else "")
            + "; data=None takes all"
        )
    mesh = jax.make_mesh(
        (data, fsdp),
        AXES,
        # With Explicit axes, the default, models with convolutions do not trace.
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=jax.devices()[:wanted],
    )
    return Layout(mesh, tuple((pattern, how) for pattern, how in rules))


def _split(
    name: str, shape: tuple[int, ...], pattern: str, dimension: Any, parts: int
) -> PartitionSpec:
    if dimension == "largest":
        even = [d for d, size in enumerate(shape) if size % parts == 0]
        dimension = max(even, key=lambda d: shape[d], default=None)
    if dimension is None:
        return _WHOLE
    if dimension >= len(shape) or shape[dimension] % parts:
        raise ValueError(
            f"rule ({pattern!r}, {dimension}) cannot split the parameter {name!r} of "
            f"shape {shape} over fsdp={parts}; use another dimension, 'largest' or None"
        )
    return PartitionSpec(*(None,) * dimension, "fsdp")
