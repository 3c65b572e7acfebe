"""Tiny runs of the real loop, for the tests of everything around it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from configs import digits_mlp_dpsgd
from dpjax.checkpoint import load_export
from dpjax.metrics import read_jsonl

ROOT = Path(__file__).parent.parent


def tiny(variant="dpsgd", **changes):
    """A config of 12 cheap steps on digits; keys as in ``**{"run.seed": 1}``."""
    config = digits_mlp_dpsgd.get_config(variant)
    if variant == "dpsgd":
        config.mechanism.epsilon = None
        config.mechanism.noise_multiplier = 1.0
        config.mechanism.sampling.rate = 0.1
    config.mechanism.steps = 12
    config.model.features = (8,)
    config.compute.physical_batch_size = 64
    config.run.seed = 1
    config.run.log_every = 6
    config.run.eval_every = 6
    config.run.checkpoint_every = 4
    config = config.to_dict()
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
