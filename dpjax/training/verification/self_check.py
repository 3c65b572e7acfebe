"""Checks of a run's own parts before its first step: ``run.self_check=True``.

They run the configured loss, sampler, mechanism and optimizer, and every engine, on a few
real examples and on empty sums, and say only which checks passed: a number would be a
statistic of private data without noise. That a check fails is a fact about the data, too;
it stops the run, and is told to whoever started it.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpjax.clipping import ENGINES, Engine
from dpjax.models.partition import partition, with_frozen
from dpjax.optimizers import owning
from dpjax.privacy.noise import root_key
from dpjax.privacy.sensitive import ClippedSum, PerExample, reveal
from dpjax.training import terminal
from dpjax.training.experiment import Experiment
from dpjax.training.verification.draws import check_accounting, check_draws
from dpjax.training.verification.errors import SelfCheckError
from dpjax.training.verification.noises import (
    check_fresh,
    check_keys,
    check_moments,
    check_reach,
)
from dpjax.transforms import private
from dpjax.typing import Batch, Params

EXAMPLES = 8
"""Real examples that are looked at in every way."""
_FINITE = 256
"""Real examples whose gradients are only asked to be finite."""
_STEPS = 64
CONFIGURED = "config.compute.engine"
_ROUNDING = 1e-4
"""Of float32 sums and norms, relative to the bound."""
_FIX = "use config.compute.engine='vmap' and report the loss"

Ask = Callable[[str, Params, Batch], tuple[ClippedSum, PerExample]]


class Part(NamedTuple):
    """What is checked: the experiment at fresh parameters, on a few examples.

    ``params`` are those that are trained.

    ``asks`` are ``(phase, params, batch) -> (ClippedSum, PerExample)`` by each engine: the
    configured one first, as ``CONFIGURED``, then those that ship, by name.
    """

    experiment: Experiment
    params: Params
    batch: Batch
    asks: Mapping[str, Ask]

    @property
    def reference(self) -> Ask:
        """By per-example gradients."""
        return self.asks.get("vmap", self.asks[CONFIGURED])


def self_check(experiment: Experiment) -> str:
    """Run all checks.

    Returns:
        One line for each check: what was found to hold.

    Raises:
        SelfCheckError: The first check that failed, with what it means and the fix.
    """
    source = experiment.source
    count = min(EXAMPLES, len(source))
    index = [i * len(source) // count for i in range(count)]
    rows = jax.tree.map(jnp.asarray, source[index])
    blank = jax.tree.map(lambda column: jnp.zeros_like(column[0]), rows)
    start = jax.jit(experiment.model.init)(jax.random.key(0), blank)
    params, frozen = partition(start, experiment.train)
    batch = Batch(rows, np.ones(count, bool), np.asarray(index, np.int32))
    engines = {CONFIGURED: experiment.engine} | {
        name: engine
        for name, engine in ENGINES.items()
        if engine is not experiment.engine
    }
    asks = {name: _asking(experiment, e, params, frozen) for name, e in engines.items()}
    part = Part(experiment, params, batch, asks)
    lines = [check() for check in _checks(part)]
    return "\n".join(["self-check, all passed", *(f"  {line}" for line in lines)])


def _checks(part: Part) -> tuple[Callable[[], str], ...]:
    mechanism, params = part.experiment.mechanism, part.params
    of_part = (check_finite, check_per_example, check_update)
    always = (
        *(functools.partial(check, part) for check in of_part),
        functools.partial(check_draws, mechanism),
    )
    if not mechanism.private:
        return always
    return (
        *always,
        functools.partial(check_accounting, mechanism),
        functools.partial(check_sensitivity, part),
        functools.partial(check_engine, part),
        functools.partial(check_keys, params),
        functools.partial(check_reach, mechanism, params),
        functools.partial(check_fresh, mechanism, params),
        functools.partial(check_moments, mechanism),
    )


def check_finite(part: Part) -> str:
    """Loss and gradient are finite at the initial parameters.

    How many are not is told on the operator's terminal only.
    """
    source, size = part.experiment.source, len(part.batch.mask)
    count = max(min(_FINITE, len(source)) // size, 1) * size
    found = 0
    for phase, params in _points(part):
        for begin in range(0, count, size):
            index = [i * len(source) // count for i in range(begin, begin + size)]
            rows = jax.tree.map(jnp.asarray, source[index])
            batch = Batch(rows, part.batch.mask, np.asarray(index, np.int32))
            statistics = reveal(part.reference(phase, params, batch)[1])
            finite = np.isfinite(statistics["losses"]) & ~statistics["nonfinite"]
            found += size - int(finite.sum())
    if found:
        private = part.experiment.mechanism.private
        told = f"{found} losses or gradients of {count} examples are not finite"
        terminal.tell([told], private=private)
        raise SelfCheckError(
            "a loss or gradient is NaN or infinite at the initial parameters; such "
            "examples would be dropped from every sum: correct the data or the loss"
        )
    return f"loss and gradient are finite on {count} examples"


def check_per_example(part: Part) -> str:
    """Nothing of an example changes when all others are replaced."""
    phase, params = _points(part)[0]
    _, whole = part.reference(phase, params, part.batch)
    count = len(part.batch.mask)
    for kept in range(count):
        # All other rows become copies of one other example.
        other = (kept + 1) % count
        rows = np.where(np.arange(count) == kept, kept, other)
        examples = jax.tree.map(lambda x, rows=rows: x[rows], part.batch.examples)
        index = np.asarray(part.batch.index)[rows]
        _, alone = part.reference(
            phase, params, Batch(examples, part.batch.mask, index)
        )
        for name in ("losses", "norms"):
            one, two = (float(reveal(s)[name][kept]) for s in (whole, alone))
            if not math.isclose(one, two, rel_tol=_ROUNDING, abs_tol=1e-6):
                raise SelfCheckError(
                    f"the {name} of an example depend on the other examples of its batch: "
                    "the loss keeps a state or mixes examples (batch normalisation?), so "
                    "clipping bounds nothing; use a loss of one example alone"
                )
    return "loss and norm of an example do not depend on the others"


def check_sensitivity(part: Part) -> str:
    """Removing one example moves the clipped sum by at most what release assumes."""
    for engine, ask in part.asks.items():
        for phase, params in _points(part):
            _check_neighbours(engine, functools.partial(ask, phase, params), part.batch)
    return "one example moves the clipped sum by at most its bound, in every engine"


def _check_neighbours(
    engine: str, ask: Callable[[Batch], tuple[ClippedSum, PerExample]], batch: Batch
) -> None:
    count = len(batch.mask)
    whole, _ = ask(batch)
    bound = float(whole.l2_bound)
    rest = float(whole.outer_norm) - bound
    limits = {"total": bound, "residual": rest, "count": 0.5}
    for left_out in range(count):
        without, _ = ask(batch._replace(mask=np.arange(count) != left_out))
        for name, limit in limits.items():
            one, two = getattr(whole, name), getattr(without, name)
            if one is None or math.isinf(limit):
                continue
            moved = float(optax.tree.norm(jax.tree.map(jnp.subtract, one, two)))
            # Rounding grows with the sums, which are the larger for a large bound.
            slack = _ROUNDING * count * (1.0 if name == "count" else bound)
            if not moved <= limit + slack:
                raise SelfCheckError(
                    f"{engine}: removing one example moves the {name} of the clipped sum "
                    f"by more than its bound: the engine clips wrongly for this loss; {_FIX}"
                )


def check_engine(part: Part) -> str:
    """Engines agree with per-example gradients, and the sums of chunks add up."""
    count = len(part.batch.mask)
    first = np.arange(count) < count // 2
    for phase, params in _points(part):
        truth, _ = part.reference(phase, params, part.batch)
        for engine, ask in part.asks.items():
            whole, _ = ask(phase, params, part.batch)
            one, two = (
                ask(phase, params, part.batch._replace(mask=mask))[0]
                for mask in (first, ~first)
            )
            for sums in (whole, one.merge(two)):
                if not _agree(sums, truth, count=count):
                    raise SelfCheckError(
                        f"{engine}: the sum is not that of per-example gradients, or not "
                        f"the sum of its parts; {_FIX}"
                    )
    names = ", ".join(ENGINES)
    return f"engines agree with per-example gradients, whole and in chunks: {names}"


def _agree(sums: ClippedSum, truth: ClippedSum, *, count: int) -> bool:
    limit = 1e-3 * float(truth.l2_bound) * count
    for ours, theirs in ((sums.total, truth.total), (sums.residual, truth.residual)):
        if theirs is None:
            continue
        apart = float(optax.tree.norm(jax.tree.map(jnp.subtract, ours, theirs)))
        # Residuals are as long as gradients are.
        if not apart <= limit + 1e-3 * float(optax.tree.norm(theirs)):
            return False
    return True


def check_update(part: Part) -> str:
    """The update is the optimizer's answer to the released gradient, and nothing else."""
    experiment, params = part.experiment, part.params
    mechanism, key = experiment.mechanism, root_key(0)
    phase = mechanism.phase(0)
    clipped, _ = part.asks[CONFIGURED](phase, params, part.batch)
    state = mechanism.init(params)
    mean, _ = mechanism.release(clipped, state, params, key=key, step=0)
    for optimizer in (owning(optax.identity()), owning(experiment.optimizer)):
        expected, _ = optimizer.update(mean, optimizer.init(params), params)
        transform = private(mechanism, optimizer, noise_key=key)
        update: Any = transform.update
        found, after = update(clipped, transform.init(params), params)
        apart = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), found, expected)
        scale = float(optax.tree.norm(expected)) + 1e-12
        if int(after.step) != 1 or not max(jax.tree.leaves(apart)) <= 1e-4 * scale:
            raise SelfCheckError(
                "the update is not the optimizer's answer to the released gradient: "
                "something else of the data reaches the parameters"
            )
    return "the update is the optimizer's answer to the released gradient"


def _points(part: Part) -> list[tuple[str, Params]]:
    """Return each phase, and the parameters at which it is asked."""
    mechanism = part.experiment.mechanism
    steps = range(min(mechanism.steps, _STEPS))
    phases = dict.fromkeys(mechanism.phase(step) for step in steps)
    # Differences are of two points: the initial one and this.
    moved = jax.tree.map(lambda x: x + 0.01, part.params)
    first = mechanism.phase(0)
    return [(phase, part.params if phase == first else moved) for phase in phases]


def _asking(
    experiment: Experiment, engine: Engine, start: Params, frozen: Params
) -> Ask:
    """Compile the query of a first step, or of a second one at moved parameters."""
    mechanism = experiment.mechanism

    @functools.partial(jax.jit, static_argnums=0)
    def ask(phase: str, params: Params, batch: Batch, frozen: Params) -> Any:
        query = mechanism.query(phase, params, mechanism.init(start))
        loss = with_frozen(experiment.loss, frozen)
        return engine(loss, query, batch, jax.random.key(0))

    return lambda phase, params, batch: ask(phase, params, batch, frozen)
