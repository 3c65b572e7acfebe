"""Mechanisms with phases or a public state in the loop: resumed exactly, one radius."""

import dataclasses

import jax
import numpy as np
import pytest

from dpjax.data.batches import batches
from dpjax.privacy.noise import root_key
from dpjax.training.experiment import build_experiment
from dpjax.training.ledger import Ledger
from dpjax.training.state import init_state, sampling_seed
from dpjax.training.step import make_train_step
from dpjax.training.train import train
from dpjax.transforms import private
from tests.checks import thinned
from tests.runs import assert_same_export, tiny

pytestmark = pytest.mark.usefixtures("shared_steps")

SPIDER = {
    "name": "dpjax.mechanisms:SpiderBoost",
    "clip_norm": 0.5,
    "difference_clip_norm": 1.0,
    "noise_multiplier": 4.0,
    "noise_ratio": 1.0,
    "sampling": {
        "name": "dpjax.privacy:PeriodicPoisson",
        "period": 4,
        "first_rate": 0.3,
        "rate": 0.1,
    },
    "steps": 12,
    "delta": 1e-5,
}


LOCAL = {
    "name": "dpjax.mechanisms:Diff2BvrLSgd",
    "clip_norm": 0.5,
    "difference_clip_norm": 1.0,
    "local_clip_norm": 1.0,
    "restart_every": 2,
    "noise_multiplier": 4.0,
    "noise_ratio": 1.0,
    "local_noise_ratio": 1.0,
    "sampling": {
        "name": "dpjax.privacy:PeriodicPoisson",
        "period": 3,
        "first_rate": 1.0,
        "rate": 0.1,
    },
    "steps": 12,
    "delta": 1e-5,
}
ZERO = {
    "name": "dpjax.mechanisms:DpZero",
    "clip_norm": 0.5,
    "smoothing": 1e-3,
    "direction_seed": 0,
    "noise_multiplier": 4.0,
    "sampling": {"name": "dpjax.privacy:Poisson", "rate": 0.1},
    "steps": 12,
    "delta": 1e-5,
}


@pytest.mark.parametrize("mechanism", thinned([(LOCAL,), (ZERO,)], 2))
def test_a_run_resumed_on_the_way_is_the_undisturbed_one(
    mechanism, tmp_path, monkeypatch
):
    one, other = tmp_path / "one", tmp_path / "other"
    # What compiles and accounts fastest: it makes no difference to what is resumed.
    plain = {
        "mechanism": mechanism,
        "compute.engine": "vmap",
        "run.log_every": 12,
        "run.eval_every": 12,
    }
    expected = train(tiny(**plain), one)
    record = Ledger.record

    def dying(self, step, fingerprint):
        if step >= 7:
            raise KeyboardInterrupt
        record(self, step, fingerprint)

    config = tiny(**plain, **{"run.checkpoint_every": 3})
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "record", dying)
        with pytest.raises(KeyboardInterrupt):
            train(config, other)
    found = train(config, other)
    assert_same_export(one, other)
    states = [state.private.mechanism for state in (found, expected)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    counts = [leaf for leaf in jax.tree.leaves(states[0]) if leaf.dtype == np.int32]
    assert max(map(int, counts)) == 12


def test_all_chunks_of_a_step_are_clipped_to_the_radius_of_its_empty_sum():
    """Else a radius that two programs round differently would break the seal."""
    config = tiny(mechanism=SPIDER)
    experiment = build_experiment(config)
    mechanism = experiment.mechanism
    transform = private(mechanism, experiment.optimizer, noise_key=root_key(1))
    state = init_state(config, experiment, transform)
    step = make_train_step(config, experiment, transform)
    stream = batches(
        experiment.source,
        mechanism,
        seed=sampling_seed(state),
        physical_batch_size=32,
    )
    state, _, _ = step(state, next(stream))
    batch = next(stream)
    stream.close()
    assert len(batch.chunks) > 1
    total = step.begin("difference", state)
    # As another program might round it, and as release tolerates it.
    nearby = np.nextafter(np.float32(total.l2_bound), np.float32(np.inf))
    total = dataclasses.replace(total, l2_bound=jax.numpy.asarray(nearby))
    for chunk in batch.chunks:
        total, _ = step.accumulate("difference", state, total, chunk)
    assert total.l2_bound == nearby
    _, released = step.finish(state, total)
    assert np.isfinite(released.update_norm)
