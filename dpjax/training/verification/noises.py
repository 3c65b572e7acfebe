"""Is the noise of releases what is accounted: as large, and new for every leaf and step?"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from dpjax.mechanisms import Mechanism
from dpjax.mechanisms.adversary import simulation
from dpjax.mechanisms.adversary.views import has_view, view
from dpjax.privacy.noise import add_noise, root_key
from dpjax.training.verification import reference_noise
from dpjax.training.verification.accounted import terms
from dpjax.training.verification.errors import SelfCheckError
from dpjax.typing import Params

_STEPS, _WIDTH = 64, 16
"""Releases that are compared with each other, and numbers of each leaf in them."""
_MOMENTS, _RUN = 96_000, 24
"""Noises whose moments are taken (a deviation that is 3% too small is 12 standard errors
off), and most steps of a simulated run."""
_FAR_STEPS = (0, 1, 8, 2**16, 2**16 + 1, 2**31 - 1)
"""Steps whose noise is compared with a reference."""
_ERRORS = 6
"""Standard errors that are still taken for chance."""


def check_reach(mechanism: Mechanism, params: Params) -> str:
    """Return that noise reaches every parameter, in its own shape.

    Raises:
        SelfCheckError: Some have less than others.
    """
    stacked = _by_leaf(silent_releases(mechanism, params, 6))
    pooled = math.sqrt(np.mean(np.concatenate([x.ravel() for x in stacked]) ** 2))
    for noise in stacked:
        error = _ERRORS / math.sqrt(2 * noise.size) + 0.02
        alike = abs(np.sqrt(np.mean(noise**2)) - pooled) < error * pooled
        # Of a few numbers alone, none would be alike enough.
        if not (alike and noise.any()):
            raise SelfCheckError(
                "noise is not alike on all parameters: release adds too little to some"
            )
    return "noise reaches every parameter"


def check_keys(params: Params) -> str:
    """Return that noise is what an independent reference draws from the same key.

    Exactly, up to the grid that noisy values are rounded to, for every leaf.

    Raises:
        SelfCheckError: It is not.
    """
    key, stddev = root_key(), 1.5
    root, unit = np.asarray(jax.random.key_data(key)), reference_noise.grid(stddev)
    tree = jax.tree.map(lambda x: x.astype(jnp.float32), _small(params))
    draw = jax.jit(functools.partial(add_noise, stddev=stddev))
    for step, stream in itertools.product(_FAR_STEPS, range(2)):
        found = draw(tree, key=key, step=jnp.int32(step), stream=jnp.int32(stream))
        for index, leaf in enumerate(jax.tree.leaves(found)):
            truth = stddev * reference_noise.normals(
                root, step=step, stream=stream, index=index, shape=leaf.shape
            )
            if not np.all(np.abs(np.asarray(leaf) - truth) <= 0.55 * unit):
                raise SelfCheckError(
                    "noise is not what its key, step, stream and leaf say: another would "
                    "be drawn on other devices, or the same one twice"
                )
    return f"noise of {len(jax.tree.leaves(tree))} leaves is that of a slow reference"


def check_fresh(mechanism: Mechanism, params: Params) -> str:
    """Return that no leaf and no step has the noise of another, or a multiple of it.

    Raises:
        SelfCheckError: Two do.
    """
    leaves = _by_leaf(silent_releases(mechanism, _small(params), _STEPS))
    rows = np.concatenate(leaves, axis=1)
    if _related(rows, at_least=0.9999):
        raise SelfCheckError("two steps have the same noise: a key is used twice")
    slope = mechanism.query(mechanism.phase(0), params, mechanism.init(params)).slope
    if slope is None:  # else one number is released, times a public direction
        # Differences: memories that are released, too, go slowly.
        first = np.diff(np.stack([leaf[:, 0] for leaf in leaves]), axis=1)
        if _related(first, at_least=0.95):
            raise SelfCheckError(
                "two parameters have the same noise: a key is used twice"
            )
    return f"noise is fresh at each of {len(rows)} steps, and in each of {len(leaves)} leaves"


def check_moments(mechanism: Mechanism) -> str:
    """Return that releases of no example are as noisy as is accounted.

    Raises:
        SelfCheckError: To an attacker who knows the plan they are not N(0, 1) in units that
            an example moves by what the event says.
    """
    name = type(mechanism).__name__
    if not has_view(mechanism):
        return f"size of noise: not checked, {name} has no view"
    accounted = [
        term.noise_multiplier
        for term in terms(mechanism.event())
        if term.noise_multiplier is not None
    ]
    shift = float(view(mechanism).shifts.max())
    if accounted and shift * min(accounted) > 1 + 1e-6:
        raise SelfCheckError(
            f"the noise of {name} is not what is accounted: an example moves a release by "
            f"{shift:.6g} of its standard deviations, and the event says "
            f"{1 / min(accounted):.6g}"
        )
    steps = min(mechanism.steps, _RUN)
    trials = math.ceil(_MOMENTS / steps)
    y = simulation.silence(mechanism, trials=trials, steps=steps, seed=0)
    error = _ERRORS / math.sqrt(y.size)
    wrong = abs(y.mean()) > error or abs(y.var() - 1) > math.sqrt(2) * error
    apart = np.corrcoef(y.T) - np.eye(steps) if steps > 1 else np.zeros(1)
    related = np.abs(apart).max() > _ERRORS / math.sqrt(trials)
    if wrong or related or abs(np.mean(y**4) - 3) > 10 * error:
        raise SelfCheckError(
            f"the noise of {name} is not what is accounted: moments of releases without "
            "examples are not those of N(0, noise_stddev^2)"
        )
    return f"moments of {y.size} noises are as accounted, all steps apart"


def silent_releases(mechanism: Mechanism, params: Params, most: int) -> list[Params]:
    """Return up to ``most`` releases of no example, at steps of the first phase."""
    key = root_key(0)

    @functools.partial(jax.jit, static_argnums=0)
    def release(phase: str, state: Any, step: Array) -> tuple[Params, Any]:
        empty = mechanism.query(phase, params, state).empty()
        return mechanism.release(empty, state, params, key=key, step=step)

    state, found, first = mechanism.init(params), [], mechanism.phase(0)
    for step in range(min(mechanism.steps, _STEPS)):
        mean, state = release(mechanism.phase(step), state, jnp.int32(step))
        if mechanism.phase(step) == first:
            found.append(mean)
        if len(found) == most:
            break
    return found


def _small(params: Params) -> Params:
    """Return a tree of as many leaves: which noise a leaf has is a matter of its number."""
    return jax.tree.map(
        lambda x: jnp.zeros((min(x.size, _WIDTH),) if x.ndim else (), x.dtype), params
    )


def _by_leaf(releases: list[Params]) -> list[NDArray[np.float64]]:
    """Return the numbers of each leaf that has any, ``[releases, numbers]``."""
    leaves = zip(*map(jax.tree.leaves, releases), strict=True)
    stacked = [np.stack([np.ravel(x) for x in leaf]) for leaf in leaves]
    return [leaf.astype(np.float64) for leaf in stacked if leaf.size]


def _related(rows: NDArray[np.float64], *, at_least: float) -> bool:
    """Return whether two rows, ``[n, k]``, are multiples of each other, or nearly so."""
    count, numbers = rows.shape
    if count < 2:
        return False
    if numbers < 4:
        # Noise is rounded: of single ones one pair in 3,600 is equal by chance, so that
        # some may be; of three numbers, none.
        equal = count - len({row.tobytes() for row in rows})
        return equal > (0 if numbers == 3 else 3 + count // 5)
    # Of independent rows, one pair in 1e12 is beyond.
    chance = math.sqrt(1 - 10 ** (-24 / (numbers - 2)))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.abs(np.corrcoef(rows) - np.eye(count))
    return bool(np.nanmax(found) > max(at_least, chance))
