"""Tiny runs of the real loop, for the tests of everything around it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from dpjax.training import train as loop
from dpjax.training.export import load_export
from dpjax.training.ledger import Ledger
from dpjax.training.metrics import read_jsonl
from tests import tiny_config

ROOT = Path(__file__).parent.parent

SWEEP = """
from experiments.sweeps.sweep import Cell, grid, seeded
from tests import tiny_config

BEST = "highest"

def config():
    config = tiny_config.get_config()
    config.mechanism.steps = 2
    config.optimizer.name = "dpjax.optimizers:tunable_sgd"
    return config

def cells():
    for values in grid(lr={rates}):
        overrides = {{"optimizer.learning_rate": values["lr"]}}
        yield from seeded([Cell(values, overrides)], {seeds})
"""


def tiny(variant="dpsgd", **changes):
    """``tiny_config`` as plain dicts, with keys changed as in ``**{"run.seed": 1}``."""
    config = tiny_config.get_config(variant).to_dict()
    for key, value in changes.items():
        *path, last = key.split(".")
        node = config
        for name in path:
            node = node[name]
        node[last] = value
    return config


def exported(workdir):
    return load_export(Path(workdir) / "export")


def card(workdir):
    return json.loads((Path(workdir) / "privacy_card.json").read_text())


def metrics(workdir):
    return read_jsonl(Path(workdir) / "metrics.jsonl")


def assert_same_export(one, other):
    a, b = exported(one), exported(other)
    assert a.keys() == b.keys()
    for layer in a:
        for name in a[layer]:
            np.testing.assert_array_equal(a[layer][name], b[layer][name])


def share_steps(patch):
    """Let the runs of one config in this process have one compiled step.

    What a run resumed elsewhere compiles anew is for the tests that kill a process.
    """
    make, made = loop.make_train_step, {}

    def shared(config, experiment, transform, frozen=()):
        seed, statistics = config["run"]["seed"], config["run"]["log_sensitive"]
        if seed is None:
            return make(config, experiment, transform, frozen)
        asked = {**config, "run": [seed, statistics]}
        key = json.dumps(asked, sort_keys=True, default=str)
        if key not in made:
            made[key] = make(config, experiment, transform, frozen)
        return made[key]._replace(frozen=frozen)

    patch.setattr(loop, "make_train_step", shared)


def crash_after(monkeypatch, steps):
    """Make the process 'die' when the release of step ``steps`` is recorded."""
    record = Ledger.record

    def dying(self, step, fingerprint):
        if step >= steps:
            raise KeyboardInterrupt
        record(self, step, fingerprint)

    monkeypatch.setattr(Ledger, "record", dying)


def command(*arguments, **options):
    """Start ``python -m experiments.train`` in a process of its own."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": ".cache/jax-tests"}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def sweep_file(directory, *, rates=(1.0, 2.0), seeds=(1, 2)):
    path = directory / "sweep.py"
    path.write_text(SWEEP.format(rates=rates, seeds=seeds))
    return str(path)
