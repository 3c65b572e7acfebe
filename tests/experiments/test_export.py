"""A run that ends early has an export, and one that goes on a card of both."""

import hashlib
import json
import shutil

import numpy as np
import pytest

import dpjax
from dpjax.training.export import load_export
from dpjax.training.train import train
from experiments import compose, export
from tests.runs import assert_same_export, card, crash_after, tiny

pytestmark = pytest.mark.usefixtures("shared_steps")

LINEAR = {"model.features": ()}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run that died in step 10 of 12; it keeps the checkpoints of steps 4 and 8."""
    workdir = tmp_path_factory.mktemp("ended") / "run"
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(**LINEAR), workdir)
    return workdir


@pytest.fixture(scope="module")
def stopped(ended):
    """Its export, at the newest checkpoint."""
    assert export.main([str(ended), f"--out={ended / 'export-8'}"]) == 0
    return ended / "export-8"


def assert_same_params(one, other):
    a, b = load_export(one), load_export(other)
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(a["head"][name], b["head"][name])


def test_the_newest_checkpoint_is_exported_with_a_card_of_all_releases(
    ended, stopped, tmp_path
):
    # A shorter plan takes the same steps: noise depends on the step, not on the plan.
    train(tiny(**LINEAR, **{"mechanism.steps": 8}), tmp_path / "eight")
    assert_same_params(stopped, tmp_path / "eight" / "export")
    found = json.loads((stopped / "privacy_card.json").read_text())
    assert (found["steps_taken"], found["steps_planned"]) == (9, 12)
    assert found["epsilon"] > card(tmp_path / "eight")["epsilon"]
    names = json.loads((stopped / "parameters.json").read_text())
    assert names == {"trained": ["head/bias", "head/kernel"], "frozen": []}
    # The rest of what it is about is the run, wherever it is exported.
    digest = hashlib.sha256((stopped / "params.npz").read_bytes()).hexdigest()
    assert found["about"] == card(ended)["about"] | {"parameters": digest}


def test_an_earlier_checkpoint_is_exported_and_the_run_goes_on(ended, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(ended, workdir)
    argv = [str(workdir), f"--out={tmp_path / 'four'}", "--step=4"]
    assert export.main(argv) == 0
    train(tiny(**LINEAR), workdir)
    train(tiny(**LINEAR), tmp_path / "undisturbed")
    assert_same_export(workdir, tmp_path / "undisturbed")
    train(tiny(**LINEAR, **{"mechanism.steps": 4}), tmp_path / "of_four")
    assert_same_params(tmp_path / "four", tmp_path / "of_four" / "export")


def test_more_steps_are_a_new_plan_with_a_card_of_both(ended, stopped, tmp_path):
    again = tiny(**LINEAR, **{"mechanism.steps": 5, "run.seed": 2})
    model = {"name": "dpjax.models.weights:exported", "path": str(stopped), "fresh": ()}
    again["model"] = {**model, "model": again["model"]}
    again["parameters"]["provenance"] = "private"
    second = tmp_path / "second"
    train(again, second)
    alone = card(second)
    assert any("starts from parameters that were trained" in f for f in alone["flags"])

    out = tmp_path / "both.md"
    assert compose.main([str(ended), str(second), f"--out={out}"]) == 0
    text = out.read_text()
    assert "starts from parameters" not in text  # the start is in it
    assert text.startswith("# Privacy card of 2 runs together: NOT PRIVATE\n")  # seeds
    assert text.count("reproducible sampling and noise") == 2
    # The steps of both are alike: together they are those of one plan of so many.
    runs = [compose._read(workdir) for workdir in (ended, second)]
    secret = [run._replace(card={**run.card, "private": True}) for run in runs]
    total = sum(run.steps for run in runs)
    assert total == 9 + 5  # the first released one step after its last card
    one = dpjax.DpSgd(
        clip_norm=1.0, clip_style="flat", noise_multiplier=4.0,
        sampling=dpjax.Poisson(rate=0.1), steps=total, num_examples=1437, delta=1e-5,
    )  # fmt: skip
    first_line = compose.composed(secret).partition("\n")[0]
    assert f"epsilon = {dpjax.epsilon(one):.4g} at delta = 1e-05" in first_line
    # Without the first run in the list, the start stays unaccounted.
    other = tmp_path / "other"
    shutil.copytree(second, other)
    assert compose.main([str(second), str(other), f"--out={out}"]) == 0
    assert "starts from parameters" in out.read_text()


def test_a_checkpoint_of_other_data_is_not_exported(ended, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(ended, workdir)
    config = json.loads((workdir / "config.json").read_text())
    for name in ("data", "evaluation"):
        config[name]["source"]["test_fraction"] = 0.3
    (workdir / "config.json").write_text(json.dumps(config))
    assert export.main([str(workdir), f"--out={tmp_path / 'x'}"]) == 2
    assert "holds a run that differs in data.source.test" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_wrong_arguments_are_one_line(ended, tmp_path, capsys):
    out = f"--out={tmp_path / 'x'}"
    for command, argv, message in [
        (export, [], "name one workdir"),
        (export, [str(ended)], "--out=DIR is missing"),
        (export, [str(ended), f"--out={tmp_path}"], "exists; export to a new folder"),
        (export, [str(ended), f"--out={ended}/export"], "is for the end of the run"),
        (export, [str(tmp_path), out], "has no config.json"),
        (export, [str(ended), out, "--step=x"], "--step=x must be an integer"),
        (
            export,
            [str(ended), out, "--step=7"],
            "step=7 has no checkpoint, only [4, 8]",
        ),
        (compose, [str(ended), f"{out}.md"], "name the workdirs of two runs or more"),
        (
            compose,
            [str(ended), str(ended), f"{out}.md"],
            "name the workdirs of two runs",
        ),
        (compose, [str(ended), str(tmp_path), f"{out}.md"], "has no config.json"),
        (compose, [str(ended), str(tmp_path)], "--out=FILE.md is missing"),
    ]:
        assert command.main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error
    assert not (tmp_path / "x").exists()
