"""What a run needs of each device's memory, and which layout would leave room for it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from dpjax.optimizers import owning
from dpjax.parallel.capacity import device_memory
from dpjax.parallel.sharding import AXES, Layout
from dpjax.privacy.noise import root_key
from dpjax.training import config as configs
from dpjax.training.experiment import Experiment
from dpjax.training.startup import blank_example
from dpjax.training.state import TrainState
from dpjax.training.step import make_train_step
from dpjax.transforms import PrivateState, private
from dpjax.typing import Batch, Example, Params


class Need(NamedTuple):
    """Bytes on one device.

    Attributes:
        params: Of the parameters, frozen ones included.
        state: Of moments, averages, memories.
        sums: Of the partial sum.
        temporaries: Of a chunk, by the compiler; None if it was not asked.
    """

    params: float
    state: float
    sums: float
    temporaries: float | None = None

    @property
    def total(self) -> float:
        """Bytes of all that is known."""
        return self.params + self.state + self.sums + (self.temporaries or 0.0)

    def __str__(self) -> str:
        parts = {"parameters": self.params, "state": self.state, "sum": self.sums}
        if self.temporaries is not None:
            parts["temporaries"] = self.temporaries
        return ", ".join(f"{name} {_size(size)}" for name, size in parts.items())


def needed(
    config: Mapping[str, Any], experiment: Experiment, shapes: tuple[Params, Params]
) -> Need:
    """Return what each device holds while a run goes on, from shapes alone.

    Args:
        config: Of the run.
        experiment: Built from it.
        shapes: Of the trained and of the frozen parameters.
    """
    layout, (trained, frozen) = experiment.layout, shapes
    state = state_shapes(config, experiment, trained)
    params = layout.bytes_each(trained, trained) + layout.bytes_each(frozen, frozen)
    sums = _sums(experiment, state)
    rest = layout.bytes_each(state, trained) - layout.bytes_each(trained, trained)
    return Need(params, rest, layout.bytes_each(sums, trained))


def checked(
    config: Mapping[str, Any], experiment: Experiment, shapes: tuple[Params, Params]
) -> Need:
    """Return ``needed``, unless it is more than a device has.

    Raises:
        ConfigError: It is. The layout that would fit is named, if there is one.
    """
    need, limit = needed(config, experiment, shapes), device_memory()
    if need.total <= limit:
        return need
    raise configs.ConfigError(
        f"config.mesh: each device would hold {_size(need.total)} ({need}) before it "
        f"computes anything, and has {_size(limit)}: {_advice(config, experiment, shapes)}"
    )


def told(need: Need, layout: Layout) -> str:
    """Return one line on the memory of each device."""
    limit, number = device_memory(), layout.devices
    devices = "1 device" if number == 1 else f"{layout} ({number} devices)"
    text = f"{need}: {_size(need.total)} of {_size(limit)}, {devices}"
    if need.total > limit:
        text += "; too much: lower compute.physical_batch_size, or raise mesh.fsdp"
    return text


def compiled(
    config: Mapping[str, Any], experiment: Experiment, shapes: tuple[Params, Params]
) -> Need:
    """Return ``needed``, and the temporaries of a chunk as the compiler counts them."""
    example = blank_example(experiment.source)
    step, arguments = lowering(config, experiment, shapes, example)
    program = step.accumulate.lower(*arguments).compile()
    temporaries = program.memory_analysis().temp_size_in_bytes
    return needed(config, experiment, shapes)._replace(temporaries=temporaries)


def lowering(
    config: Mapping[str, Any],
    experiment: Experiment,
    shapes: tuple[Params, Params],
    example: Example,
) -> tuple[Any, tuple[Any, ...]]:
    """Return the training step, and shapes to compile it for; nothing is allocated.

    Args:
        config: Of the run; its ``run``, ``evaluation`` and ``compute`` are read.
        experiment: Built from it; its data are not read.
        shapes: Of the trained and of the frozen parameters.
        example: One example, or its shapes.

    Returns:
        The ``TrainStep`` and the arguments of its ``accumulate``: phase, state, sums, batch,
        frozen parameters, each where the layout has it.
    """
    layout, (trained, frozen) = experiment.layout, shapes
    mechanism, optimizer = experiment.mechanism, experiment.optimizer
    transform = private(mechanism, optimizer, noise_key=root_key(0))
    step: Any = make_train_step(config, experiment, transform)
    state = state_shapes(config, experiment, trained)
    state = _placed(state, layout.of_state(state, trained))
    rows = config["compute"]["physical_batch_size"]

    def chunk(example: Example) -> Batch:
        examples = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), example)
        return Batch(examples, jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32))

    batch = _placed(jax.eval_shape(chunk, example), layout.by_row)
    phase = mechanism.phase(0)
    begin = step.begin.lower(phase, state).compile()
    several = layout.devices > 1
    sums = _placed(begin.out_info, begin.output_shardings if several else None)
    frozen = _placed(frozen, layout.of_params(frozen))
    return step, (phase, state, sums, batch, frozen)


def state_shapes(
    config: Mapping[str, Any], experiment: Experiment, trained: Params
) -> TrainState:
    """Return the shapes of a state; see ``state.init_state``."""
    mechanism, optimizer = experiment.mechanism, owning(experiment.optimizer)

    def make(params: Params) -> TrainState:
        key = jax.random.key(0)
        wide = jax.tree.map(
            lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params
        )
        return TrainState(
            params=params,
            private=PrivateState(
                step=jnp.zeros((), jnp.int32),
                noise_key=jax.random.split(key),
                released=jnp.zeros((), jnp.uint32),
                mechanism=mechanism.init(params),
                optimizer=optimizer.init(params),
            ),
            average=wide if config["evaluation"]["ema_decay"] > 0 else (),
            loss_key=key,
            init_key=key,
            sampling_seed=jnp.zeros(4, jnp.uint32),
        )

    return jax.eval_shape(make, trained)


def _placed(tree: Any, sharding: Any) -> Any:
    """Give shapes a sharding, or a tree of them; on one device they need none."""
    if sharding is None:
        return tree
    each = sharding
    if isinstance(sharding, jax.sharding.Sharding):
        each = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tree,
        each,
    )


def _sums(experiment: Experiment, state: TrainState) -> Any:
    mechanism = experiment.mechanism

    def empty(state: TrainState) -> Any:
        phase = mechanism.phase(0)
        return mechanism.query(phase, state.params, state.private.mechanism).empty()

    return jax.eval_shape(empty, state)


def _advice(
    config: Mapping[str, Any], experiment: Experiment, shapes: tuple[Params, Params]
) -> str:
    """Return which layout of as many devices needs least splitting and fits."""
    layout, limit = experiment.layout, device_memory()
    devices = layout.devices
    least = math.inf
    for fsdp in (n for n in range(1, devices + 1) if devices % n == 0):
        mesh = AbstractMesh(
            (devices // fsdp, fsdp, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES)
        )
        other = Layout(mesh, layout.rules)  # pyrefly: ignore[bad-argument-type]
        try:
            need = needed(config, dataclasses.replace(experiment, layout=other), shapes)
        except ValueError:  # The rules cannot split so far.
            continue
        least = min(least, need.total)
        if need.total <= limit:
            return (
                f"set config.mesh.data={devices // fsdp}, fsdp={fsdp}, model=1, where it "
                f"would hold {_size(need.total)}"
            )
    return (
        f"no layout of {devices} devices fits, the best takes {_size(least)} of each: take "
        "more devices, or train fewer parameters (config.parameters.train)"
    )


def _size(count: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} bytes"
