"""Where arrays live: a mesh of devices, rules for parameters, rows of batches.

The mesh has three axes. ``data``: replicas, of which each forms a sum of its own without any
communication with the others. One reduction, after the last chunk of a step, makes one sum
of them (``ClippedSum.merged``). ``fsdp``: devices that share the rows of a replica, and of
which each keeps a part of the parameters and of everything that is like them: moments,
averages, error memories, noise, sums. A weight is put together where it is used, one layer
after the other, and its sum is taken apart as soon as it is formed (see ``gathering``).
``model``: devices that share the products with a weight; they see the same rows.

Along ``data`` programs are written for one replica (``jax.shard_map``). Within it they are
written as for one device, and XLA's partitioner divides the work.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from dpjax.models.partition import name_of
from dpjax.parallel.gathering import gathering
from dpjax.typing import Batch, Params

AXES = ("data", "fsdp", "model")
_ROWS = PartitionSpec(("data", "fsdp"))
_WHOLE = PartitionSpec()

Rule = tuple[str, int | str | None, int | None]
"""A regular expression, searched for in names such as ``block/kernel``, and which dimensions
of the parameters it finds are split, over ``fsdp`` and over ``model``: their number, from the
end if negative; for ``fsdp`` also "largest" (the largest that can be split evenly, if any).
None for none."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and the rules that split parameters over it. Made by ``make_layout``."""

    mesh: Mesh
    rules: tuple[Rule, ...]

    @property
    def devices(self) -> int:
        """How many devices take part."""
        return self.mesh.size

    @property
    def replicas(self) -> int:
        """How many partial sums there are until the end of a step."""
        return self.mesh.shape["data"]

    @property
    def row_parts(self) -> int:
        """Among how many devices the rows of a batch are divided."""
        return self.replicas * self.mesh.shape["fsdp"]

    @property
    def split(self) -> bool:
        """Whether any device has less than whole parameters."""
        return self.devices > self.replicas

    def __str__(self) -> str:
        """Return all that decides how sums are rounded, without spaces."""
        kind = self.mesh.devices.flat[0].device_kind.replace(" ", "_")
        data, fsdp, model = self.mesh.devices.shape
        shape = f"{data}x{fsdp}" + (f"x{model}" if model > 1 else "")
        return f"{shape}/{jax.process_count()}/{kind}"

    @property
    def by_row(self) -> NamedSharding | None:
        """The sharding of the rows of a batch."""
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

    def check_params(self, params: Params) -> None:
        """Raise ValueError unless the rules split all parameters, some over ``model``.

        Args:
            params: Arrays or their shapes, of the whole model.
        """
        self.of_params(params)
        parts = self.mesh.shape["model"]
        specs = jax.tree.leaves(self._specs(params, params))
        if parts > 1 and not any("model" in spec for spec in specs):
            raise ValueError(
                f"none splits a parameter of this model over model={parts}; add one that "
                "does, or use model=1"
            )

    def of_state(self, state: PyTree, params: Params) -> PyTree | None:
        """Return the sharding of each leaf of a state; None on one device.

        A leaf whose path and shape end like those of a parameter is placed like it:
        moments, averages, error memories, past noises. All others are repeated.
        """
        if self.devices == 1:
            return None
        return jax.tree.map(self._named, self._specs(state, params))

    def bytes_each(self, state: PyTree, params: Params) -> float:
        """Return how many bytes one device has of a state, or of sums of one replica.

        Args:
            state: Arrays or their shapes.
            params: The parameters, or their shapes.
        """

        def size(leaf: Any, spec: PartitionSpec) -> float:
            parts = math.prod(self.mesh.shape[axis] for axis in spec if axis)
            width = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else 0
            return leaf.size * (width or leaf.dtype.itemsize) / parts

        sizes = jax.tree.map(size, state, self._specs(state, params))
        return float(sum(jax.tree.leaves(sizes)))

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

    def keep_sums(self, sums: PyTree, params: Params, *, lead: str | None) -> PyTree:
        """Inside a compiled function: split partial sums as the parameters are split.

        Args:
            sums: With one leading axis, of replicas.
            params: What the sums are shaped like.
            lead: "data" outside ``on_each``; None inside of it.
        """
        if self.devices == 1 or (lead is None and not self.split):
            return sums

        def kept(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
            spec = PartitionSpec(lead, *spec[1:])
            where = spec if lead is None else NamedSharding(self.mesh, spec)
            return jax.lax.with_sharding_constraint(leaf, where)

        return jax.tree.map(kept, sums, self._specs(sums, params))

    def gathering(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of parameters that puts split ones together where it uses them.

        Args:
            function: Of the parameters and other trees, for ``on_each``.
        """
        if not self.split:
            return function

        def specs(params: Params) -> list[PartitionSpec]:
            leaves = jax.tree_util.tree_leaves_with_path(params)
            return [self._spec(name_of(path), leaf.shape) for path, leaf in leaves]

        return gathering(function, specs)

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

    def to_each(self, batch: Batch) -> Batch:
        """Give every replica all rows of a batch, which every process holds."""
        if self.devices == 1:
            return batch
        where = self._named(PartitionSpec("data"))
        assert where is not None

        def repeated(rows: np.ndarray) -> jax.Array:
            all_rows = np.concatenate([rows] * self.replicas)
            return jax.make_array_from_callback(
                all_rows.shape, where, lambda index: all_rows[index]
            )

        return jax.tree.map(repeated, batch)

    def on_each(self, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Return ``function(shared, split)`` as run by each replica, without communication.

        Each gets the whole of ``shared`` and its rows of ``split``; what they return is
        stacked along the rows.
        """
        if self.devices == 1:
            return function
        # With check_vma=True, parameters that all replicas share would make every gradient
        # inside a sum over all of them, before it is clipped: see
        # tests/parallel/test_sharding.py.
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(_WHOLE, PartitionSpec("data")),
            out_specs=PartitionSpec("data"),
            axis_names={"data"} if self.split else {*AXES},
            check_vma=False,
        )

    def _named(self, spec: PartitionSpec) -> NamedSharding | None:
        # One device needs no placement, and is faster without.
        return None if self.devices == 1 else NamedSharding(self.mesh, spec)

    def _specs(self, state: PyTree, params: Params) -> PyTree:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        known = {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
        names = {jax.tree_util.keystr(path): name_of(path) for path, _ in leaves}

        def spec(path: Any, leaf: Any) -> PartitionSpec:
            text = jax.tree_util.keystr(path)
            ends = [end for end in known if text.endswith(end)]
            like = max(ends, key=len, default=None)
            # Every path ends like that of a single array, which has none; a seed is no
            # parameter.
            if like is None or not jnp.issubdtype(leaf.dtype, jnp.inexact):
                return _WHOLE
            leading = len(leaf.shape) - len(known[like])
            if leading < 0 or known[like] != leaf.shape[leading:]:
                return _WHOLE
            split = self._spec(names[like], known[like])
            return PartitionSpec(*(None,) * leading, *split) if split else _WHOLE

        return jax.tree.map_with_path(spec, state)

    def _spec(self, name: str, shape: tuple[int, ...]) -> PartitionSpec:
        for pattern, fsdp, model in self.rules:
            if re.search(pattern, name):
                return _spec(name, shape, (pattern, fsdp, model), self.mesh.shape)
        raise ValueError(
            f"no rule is for the parameter {name!r}; end with ('.*', None) to repeat "
            "all others on every device"
        )


def make_layout(
    *, data: int | None, fsdp: int, model: int, rules: Sequence[Sequence[Any]]
) -> Layout:
    """Return the layout of a mesh of ``data`` x ``fsdp`` x ``model`` devices.

    Args:
        data: Replicas; None for as many as there are devices for.
        fsdp: Devices of a replica that share its rows and keep a part of the parameters.
        model: Devices that share the products with a weight.
        rules: See ``Rule``; the first that matches counts. The last part may be left out.

    Raises:
        ValueError: There are not as many devices, some processes have more than others, or
            no rule splits over ``model``. One process may use fewer than it has.
    """
    found = jax.device_count()
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        listed = ", ".join(str(counts[process]) for process in sorted(counts))
        raise ValueError(f"the processes have {listed} devices; give each as many")
    full = [(*rule, None)[:3] for rule in rules]
    if model > 1 and not any(rule[2] is not None for rule in full):
        raise ValueError(
            f"model={model} needs rules that say what is split over it, such as "
            "dpjax.parallel.rules.TRANSFORMER; model=1 without"
        )
    each = fsdp * model
    if data is None:
        if found % each:
            raise ValueError(
                f"fsdp={fsdp} x model={model} does not divide the {found} devices"
            )
        data = found // each
    wanted = data * each
    if wanted > found or (wanted < found and jax.process_count() > 1):
        processes = jax.process_count()
        raise ValueError(
            f"data={data} x fsdp={fsdp} x model={model} needs {wanted} devices, and there "
            f"are {found}"
            + (f" in {processes} processes" if processes > 1 else "")
            + "; data=None takes all"
        )
    mesh = jax.make_mesh(
        (data, fsdp, model),
        AXES,
        # With Explicit axes, the default, models with convolutions do not trace.
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=jax.devices()[:wanted],
    )
    return Layout(mesh, tuple(full))


def _spec(
    name: str, shape: tuple[int, ...], rule: Rule, sizes: Mapping[str, int]
) -> PartitionSpec:
    axes: list[str | None] = [None] * len(shape)
    asked: tuple[tuple[str, Any], ...] = (("model", rule[2]), ("fsdp", rule[1]))
    for axis, dimension in asked:
        parts = sizes[axis]
        if dimension == "largest":
            even = [d for d, n in enumerate(shape) if n % parts == 0 and not axes[d]]
            dimension = max(even, key=lambda d: shape[d], default=None)
        # Split in one part and not split are the same to XLA, but not to jit.
        if dimension is None or parts == 1:
            continue
        if not -len(shape) <= dimension < len(shape) or shape[dimension] % parts:
            raise ValueError(
                f"rule {rule} cannot split the parameter {name!r} of shape {shape} over "
                f"{axis}={parts}; use another dimension, None, or 'largest' for fsdp"
            )
        if axes[dimension] is not None:
            raise ValueError(
                f"rule {rule} splits one dimension of the parameter {name!r} of shape "
                f"{shape} over fsdp and model; choose two"
            )
        axes[dimension] = axis
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)
