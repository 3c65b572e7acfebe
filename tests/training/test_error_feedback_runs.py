"""Error feedback in the loop: its memory is resumed exactly, and shown to nobody."""

import json
import logging

import jax
import numpy as np
import pytest

from dpjax.training.config import ConfigError
from dpjax.training.ledger import Ledger
from dpjax.training.train import train
from tests.runs import assert_same_export, card, exported, metrics, tiny

pytestmark = pytest.mark.usefixtures("shared_steps")

DICE = {
    "name": "dpjax.mechanisms:DiceSgd",
    "clip_norm": 0.5,
    "clip_style": "flat",
    "error_clip_norm": None,
    "error_scale": "sum",
    "outer_norm": 1.0,
    "noise_multiplier": 4.0,
    "sampling": {"name": "dpjax.privacy:Poisson", "rate": 0.1},
    "steps": 12,
    "delta": 1e-5,
    "accounting": "outer_clip",
}
SHUFFLED = DICE | {
    "accounting": "k_participation",
    "error_clip_norm": 1e-3,
    "sampling": {"name": "dpjax.privacy:ShuffledFixed", "batch_size": 128},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, train(tiny(mechanism=DICE), workdir)


def test_a_resumed_run_has_the_same_memory_bit_for_bit(
    tmp_path, undisturbed, monkeypatch
):
    workdir, expected = undisturbed
    record = Ledger.record

    def dying(self, step, fingerprint):
        if step >= 6:
            raise KeyboardInterrupt
        record(self, step, fingerprint)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "record", dying)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(mechanism=DICE), tmp_path)
    found = train(tiny(mechanism=DICE), tmp_path)
    assert_same_export(workdir, tmp_path)
    memories = [state.private.mechanism.memory for state in (found, expected)]
    jax.tree.map(np.testing.assert_array_equal, *memories)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(memories[0]))


def test_the_memory_is_neither_exported_nor_logged_nor_printed(undisturbed):
    workdir, state = undisturbed
    assert {path.name for path in (workdir / "export").iterdir()} == {
        "parameters.json",
        "params.npz",
        "privacy_card.json",
        "privacy_card.md",
    }
    params = jax.tree.map(np.asarray, state.average)
    assert exported(workdir).keys() == params.keys()
    jax.tree.map(np.testing.assert_array_equal, exported(workdir), params)
    public = {"step", "epsilon", "update_norm", "clip_norm"}
    public |= {"test/accuracy"}
    assert set().union(*metrics(workdir)) == public
    assert "memory" not in json.dumps(card(workdir))
    for shown in (state.private.mechanism, state.private, state):
        assert "Array" not in repr(shown)


def test_a_memory_that_cannot_drain_is_told_under_log_sensitive_only(tmp_path, caplog):
    runs = {}
    for sensitive in (False, True):
        caplog.clear()
        workdir = tmp_path / str(sensitive)
        with caplog.at_level(logging.WARNING, logger="dpjax.mechanisms"):
            config = tiny(mechanism=SHUFFLED, **{"run.log_sensitive": sensitive})
            train(config, workdir)
        runs[sensitive] = [r.getMessage() for r in caplog.records]
        logged = set().union(*metrics(workdir))
        assert ("sensitive/error_norm" in logged) == sensitive
        assert ("sensitive/error_backlog" in logged) == sensitive
    assert not any("error memory" in text for text in runs[False])
    told = [text for text in runs[True] if "the error memory diverges" in text]
    assert told
    last = metrics(tmp_path / "True")[-1]
    assert last["sensitive/error_backlog"] > 12
    # The message has public facts only.
    assert f"{last['sensitive/error_norm']:.3g}" not in told[-1]
    assert any("un-noised" in flag for flag in card(tmp_path / "True")["flags"])


def test_a_run_of_another_accounting_is_not_resumed(undisturbed):
    workdir, _ = undisturbed
    other = DICE | {"outer_norm": 2.0}
    with pytest.raises(ConfigError, match=r"differs in .*mechanism.outer_norm"):
        train(tiny(mechanism=other), workdir)
