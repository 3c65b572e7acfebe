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
from jaxtyping import Array

from dpjax.audit import distinguish
from dpjax.audit.views import has_view
from dpjax.clipping import ENGINES, Engine
from dpjax.config import ConfigError
from dpjax.experiment import Experiment
from dpjax.mechanisms import Mechanism
from dpjax.noise import root_key
from dpjax.optimizers import owning
from dpjax.partition import partition, with_frozen
from dpjax.sampling import (
    CyclicPoisson,
    FullBatch,
    PeriodicPoisson,
    Poisson,
    ShuffledFixed,
    TruncatedPoisson,
    secret_seed,
)
from dpjax.sensitive import ClippedSum, PerExample, reveal
from dpjax.transforms import private
from dpjax.typing import Batch, Params

EXAMPLES = 8
"""Real examples that are looked at."""
_STEPS = 64
CONFIGURED = "config.compute.engine"
_ROUNDING = 1e-4
"""Of float32 sums and norms, relative to the bound."""
_FIX = "use config.compute.engine='vmap' and report the loss"

Ask = Callable[[str, Params, Batch], tuple[ClippedSum, PerExample]]


class SelfCheckError(ConfigError):
    """A part of the run does not do what its privacy rests on."""


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
    lines = [check(part) for check in _checks(experiment.mechanism)]
    return "\n".join(["self-check, all passed", *(f"  {line}" for line in lines)])


def _checks(mechanism: Mechanism) -> tuple[Callable[[Part], str], ...]:
    always = (check_finite, check_per_example, check_sampler, check_update)
    if not mechanism.private:
        return always
    return (*always, check_sensitivity, check_engine, check_noise, check_shape_of_noise)


def check_finite(part: Part) -> str:
    """Loss and gradient are finite at the initial parameters."""
    for phase, params in _points(part):
        _, statistics = part.reference(phase, params, part.batch)
        found = reveal(statistics)
        if not np.isfinite(found["losses"]).all() or found["nonfinite"].any():
            raise SelfCheckError(
                "a loss or gradient is NaN or infinite at the initial parameters; such "
                "examples would be dropped from every sum: correct the data or the loss"
            )
    return f"loss and gradient are finite on {len(part.batch.mask)} examples"


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


def check_sampler(part: Part) -> str:
    """Batches are as large and as often as the plan says."""
    mechanism = part.experiment.mechanism
    sampling, size = mechanism.sampling, mechanism.num_examples
    steps, seed = min(mechanism.steps, _STEPS), secret_seed()
    seen, sizes = np.zeros(size, int), np.zeros(steps)
    for step in range(steps):
        drawn = sampling.draw(step, num_examples=size, seed=seed)
        if len(np.unique(drawn)) != len(drawn) or np.any((drawn < 0) | (drawn >= size)):
            raise SelfCheckError(
                f"{sampling} draws an example twice in a batch, or one that is not there"
            )
        seen[drawn] += 1
        sizes[step] = len(drawn)
    expected, spread = _expected_sizes(mechanism, steps)
    most = sampling.max_participations(steps=steps, num_examples=size)
    truncated = isinstance(sampling, TruncatedPoisson)
    # Six standard errors; sizes that are fixed have none.
    wrong = abs(sizes.sum() - expected) > 6 * spread + 1e-6
    wrong |= truncated and sizes.max() > sampling.capacity
    if wrong or seen.max() > most:
        raise SelfCheckError(
            f"{sampling} draws batches of other sizes than are accounted, or one example "
            f"more than {most} times in {steps} steps"
        )
    return f"{steps} batches are as the sampling is accounted"


def _expected_sizes(mechanism: Mechanism, steps: int) -> tuple[float, float]:
    """Return the expected sum of batch sizes, and its standard deviation at most."""
    from scipy.stats import binom

    sampling, size = mechanism.sampling, mechanism.num_examples
    match sampling:
        case FullBatch() | ShuffledFixed():
            return steps * mechanism.expected_batch_size, 0.0
        case Poisson():
            rates = np.full(steps, sampling.rate)
        case PeriodicPoisson():
            first = np.arange(steps) % sampling.period == 0
            rates = np.where(first, sampling.first_rate, sampling.rate)
        case TruncatedPoisson():
            # The mean of min(Binomial, capacity), which varies no more than a Binomial.
            at_least = np.arange(sampling.capacity)
            mean = binom.sf(at_least, size, sampling.rate).sum()
            variance = size * sampling.rate * (1 - sampling.rate)
            return float(steps * mean), math.sqrt(steps * variance)
        case CyclicPoisson():
            # Of one example, whose part decides how many turns it has.
            turns = np.bincount(np.arange(steps) % sampling.cycle)
            turns = np.pad(turns, (0, sampling.cycle - len(turns)))
            rate, mean = sampling.rate, turns.mean()
            variance = rate * (1 - rate) * mean + rate**2 * turns.var()
            return float(size * rate * mean), math.sqrt(size * variance)
        case _:
            # Of a sampling that does not ship, only the order of magnitude is known.
            total = steps * mechanism.expected_batch_size
            return total, total / 6
    return size * rates.sum(), math.sqrt(size * np.sum(rates * (1 - rates)))


def check_noise(part: Part) -> str:
    """Noise of the accounted size reaches every parameter, fresh at each step."""
    leaves = list(zip(*map(jax.tree.leaves, _silent_releases(part)), strict=True))
    stacked = [np.stack([np.ravel(x) for x in leaf]) for leaf in leaves]
    pooled = math.sqrt(np.mean(np.concatenate([x.ravel() for x in stacked]) ** 2))
    for noise in stacked:
        error = 6 / math.sqrt(2 * noise.size) + 0.02
        alike = abs(np.sqrt(np.mean(noise**2)) - pooled) < error * pooled
        # Of a few numbers alone, none would be alike enough.
        if not (alike and noise.any()):
            raise SelfCheckError(
                "noise is not alike on all parameters: release adds too little to some"
            )
    rows = np.concatenate(stacked, axis=1)
    if len({row.tobytes() for row in rows}) < len(rows):
        raise SelfCheckError("two steps have the same noise: a key is used twice")
    return "noise reaches every parameter, fresh at each step"


def check_shape_of_noise(part: Part) -> str:
    """Releases of no example are N(0, 1) in the units of an attacker who knows the plan."""
    mechanism = part.experiment.mechanism
    if not has_view(mechanism):
        return f"moments of noise: not checked, {type(mechanism).__name__} has no view"
    steps = min(mechanism.steps, 8)
    y = distinguish.silence(mechanism, trials=2000, steps=steps, seed=0)
    error = 6 / math.sqrt(y.size)
    wrong = abs(y.mean()) > error or abs(y.var() - 1) > math.sqrt(2) * error
    apart = np.corrcoef(y.T) - np.eye(steps) if steps > 1 else np.zeros(1)
    related = np.abs(apart).max() > 6 / math.sqrt(len(y))
    if wrong or related or abs(np.mean(y**4) - 3) > 10 * error:
        raise SelfCheckError(
            f"the noise of {type(mechanism).__name__} is not what is accounted: moments of "
            "releases without examples are not those of N(0, noise_stddev^2)"
        )
    return f"moments of {y.size} noises are as accounted, all steps apart"


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


def _silent_releases(part: Part) -> list[Params]:
    """Return up to 6 releases of no example, at steps of the first phase."""
    mechanism, params, key = part.experiment.mechanism, part.params, root_key(0)

    @functools.partial(jax.jit, static_argnums=0)
    def release(phase: str, state: Any, step: Array) -> tuple[Params, Any]:
        empty = mechanism.query(phase, params, state).empty()
        return mechanism.release(empty, state, params, key=key, step=step)

    state, found, first = mechanism.init(params), [], mechanism.phase(0)
    for step in range(min(mechanism.steps, _STEPS)):
        mean, state = release(mechanism.phase(step), state, jnp.int32(step))
        if mechanism.phase(step) == first:
            found.append(mean)
        if len(found) == 6:
            break
    return found
