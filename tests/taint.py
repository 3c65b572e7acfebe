"""What of a training step, and of a run, can depend on the data but through its noise.

Whatever gets noise is replaced by zeros: there the data ends. What it reaches all the same
is found in the traced program of the real step, so for any values, and in what two runs on
different data write.
"""

import contextlib
import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from dpjax.mechanisms import DiceSgd
from dpjax.mechanisms.mathematics import correlated
from dpjax.privacy import noise
from dpjax.privacy.noise import root_key
from dpjax.training import train as train_module
from dpjax.training.experiment import build_experiment
from dpjax.training.state import init_state
from dpjax.training.step import make_train_step
from dpjax.training.train import train
from dpjax.transforms import private
from tests.runs import card, exported, metrics, tiny


@contextlib.contextmanager
def no_release():
    """Let whatever gets noise come out as zeros instead."""

    def constant(tree, **where):
        del where
        return jax.tree.map(jnp.zeros_like, tree)

    with (
        mock.patch.object(noise, "add_noise", constant),
        mock.patch.object(correlated, "add_noise", constant),
    ):
        yield


def reached(mechanism, *, harm=lambda finish: finish, transform_of=private):
    """Return the paths of outputs of a step, of any phase, that its sums reach.

    Args:
        mechanism: Which.
        harm: ``finish -> finish``, what is to be caught.
        transform_of: In place of ``private``, likewise.
    """
    adam = {"name": "optax:adam", "learning_rate": 0.1}
    config = tiny(**{"evaluation.ema_decay": 0.9, "optimizer": adam})
    experiment = dataclasses.replace(build_experiment(config), mechanism=mechanism)
    transform = transform_of(mechanism, experiment.optimizer, noise_key=root_key(1))
    state = init_state(config, experiment, transform)
    step = make_train_step(config, experiment, transform)
    found = set()
    for phase in {mechanism.phase(t) for t in range(6)}:
        sums = step.begin(phase, state)
        with no_release():
            found |= tainted(
                harm(step.finish),
                lambda state, sums: (sums.total, sums.residual, sums.count),
                state,
                sums,
            )
    return found


def check_step(mechanism, **changes):
    """Nothing that leaves a step depends on its sums, but the memory known as private."""
    secret = "[0].private.mechanism.memory"
    found = reached(mechanism, **changes)
    known = {path for path in found if path.startswith(secret)}
    assert found == known, found - known
    assert bool(known) == isinstance(mechanism, DiceSgd)


class Altered:
    """Other data of the same shapes."""

    def __init__(self, source, sign):
        self._source, self._sign = source, sign

    def __len__(self):
        return len(self._source)

    def __getitem__(self, indices):
        rows = self._source[indices]
        return rows | {"image": rows["image"] * self._sign}


def check_run(workdir, *, harm=lambda experiment: experiment):
    """All that a run writes is the same for two training sets, examples/s aside.

    Args:
        workdir: Empty.
        harm: ``experiment -> experiment``, what is to be caught.
    """
    config = tiny(
        **{
            "mechanism.steps": 2,
            "run.eval_every": 1,
            "run.log_every": 1,
            "run.self_check": False,
        }
    )
    written = []
    for sign in (1, -1):

        def altered(config, sign=sign):
            experiment = build_experiment(config)
            source = Altered(experiment.source, sign)
            return harm(dataclasses.replace(experiment, source=source))

        here = workdir / str(sign)
        with no_release(), mock.patch.object(train_module, "build_experiment", altered):
            train(config, here)
        lines = [
            {k: v for k, v in line.items() if k not in ("examples/s", "time")}
            for line in metrics(here)
        ]
        assert len(lines) == 2
        told = {k: v for k, v in card(here).items() if k != "date"}
        written.append((lines, told, exported(here)))
    (lines, told, params), (others, other, expected) = written
    assert lines == others
    assert told == other
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def tainted(function, sources, *args):
    """Return paths of the outputs of ``function(*args)`` that a source can reach.

    Each primitive is taken to pass all of its inputs on to all of its outputs.

    Args:
        function: Traceable.
        sources: ``args -> `` what is followed, a pytree of leaves of ``args``.
        args: Pytrees of arrays.
    """
    marks = {id(leaf) for leaf in jax.tree.leaves(sources(*args))}
    start = [id(leaf) in marks for leaf in jax.tree.leaves(args)]
    assert sum(start) == len(marks) > 0
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    hits = _follow(closed.jaxpr, start)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(shape)]
    return {path for path, hit in zip(paths, hits, strict=True) if hit}


def _follow(jaxpr, start):
    dirty = {v for v, hit in zip(jaxpr.invars, start, strict=True) if hit}
    for eqn in jaxpr.eqns:
        hits = [not isinstance(v, Literal) and v in dirty for v in eqn.invars]
        if not any(hits):
            continue
        if eqn.primitive.name == "jit":
            hits = _follow(eqn.params["jaxpr"].jaxpr, hits)
        elif eqn.primitive.name == "scan" and eqn.params["length"] > 0:
            hits = _follow_scan(eqn.params, hits)
        else:
            hits = [True] * len(eqn.outvars)
        dirty |= {v for v, hit in zip(eqn.outvars, hits, strict=True) if hit}
    return [not isinstance(v, Literal) and v in dirty for v in jaxpr.outvars]


def _follow_scan(params, hits):
    """After at least one turn: what the body passes on, whatever turns have left."""
    first = params["num_consts"]
    last = first + params["num_carry"]
    while True:
        out = _follow(params["jaxpr"].jaxpr, hits)
        carry = [a or b for a, b in zip(hits[first:last], out, strict=False)]
        if carry == hits[first:last]:
            return out
        hits = [*hits[:first], *carry, *hits[last:]]
