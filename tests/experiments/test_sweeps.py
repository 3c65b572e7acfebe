"""Sweeps: run once, told apart, gathered with intervals, and paid for."""

import itertools
import json
import runpy
import subprocess
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats

from dpjax.training import train as loop
from dpjax.training.config import ConfigError, digest
from dpjax.training.export import load_export
from experiments import ablate, gather
from experiments.sweeps import summary, sweep
from launch import slurm
from tests.runs import SWEEP, sweep_file, tiny


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    # Both are for a process of their own: these tests share theirs.
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    monkeypatch.setattr(ablate, "_cache_programs", lambda: None)


class Trainer:
    """Stands in for training: leaves what a run leaves, with scores of our choice."""

    def __init__(self, monkeypatch, *, fail=()):
        self.fail, self.seen = set(fail), []
        monkeypatch.setattr(loop, "train", self)

    def __call__(self, config, folder):
        label = config["optimizer"]["learning_rate"], config["run"]["seed"]
        self.seen.append(label)
        facts = {"noise_multiplier": 4.0, "num_examples": 1437}
        resolved = {"resolved": {"mechanism": facts}}
        (folder / "config.json").write_text(json.dumps(config | resolved))
        if label in self.fail:
            raise FloatingPointError("diverged")
        card = {"epsilon": 0.5, "delta": 1e-5, "proven": True, "flags": []}
        (folder / "privacy_card.json").write_text(json.dumps(card))
        score = {"step": 2, "test/accuracy": label[0] / 10 + label[1] / 100}
        (folder / "metrics.jsonl").write_text(json.dumps(score) + "\n")


def results(directory):
    manifest = sweep.read_json(directory / "sweep.json")
    return summary.results(manifest, directory)


def test_one_cell_that_diverges_does_not_stop_the_others(tmp_path, capsys):
    source = sweep_file(tmp_path, rates=(1e38, 1.0), seeds=(1,))
    out = tmp_path / "runs"
    assert ablate.main([source, f"--out={out}"]) == 1
    diverged, good = results(out)
    assert diverged["status"] == "failed"
    assert diverged["error"].startswith(
        "FloatingPointError: the update of step 0 is not"
    )
    assert good["status"] == "finished"
    assert 0 < good["score"] < 1
    assert 0 < good["epsilon"] < 1
    assert good["metric"] == "test/accuracy"
    assert "reproducible" in good["flags"][0]
    assert len(good["git"]["commit"]) == 40
    assert good["versions"]["jax"] == jax.__version__
    assert digest(good["config"]) in {path.name for path in out.iterdir()}
    # The run that diverged had begun: it counts.
    assert summary.cost([out]).runs == 2
    assert gather.main([str(out)]) == 1
    assert "cell 0 failed: FloatingPointError" in capsys.readouterr().out


def test_what_is_finished_is_not_run_again(tmp_path, monkeypatch, capsys):
    source, out = sweep_file(tmp_path), tmp_path / "runs"
    trainer = Trainer(monkeypatch, fail=[(2.0, 1)])
    assert ablate.main([source, f"--out={out}"]) == 1
    assert trainer.seen == [(1.0, 1), (1.0, 2), (2.0, 1), (2.0, 2)]
    trainer.seen, trainer.fail = [], set()
    assert gather.main([str(out), "--resubmit"]) == 0
    assert trainer.seen == [(2.0, 1)]
    assert {result["status"] for result in results(out)} == {"finished"}
    assert ablate.main([source, f"--out={out}"]) == 0
    assert trainer.seen == [(2.0, 1)]
    assert "0 of 4 cells to run" in capsys.readouterr().out


def test_repetitions_draw_secret_seeds_of_their_own(tmp_path, capsys):
    source = tmp_path / "sweep.py"
    source.write_text(
        "from experiments.sweeps.sweep import Cell, repeated\n"
        "from tests import tiny_config\n"
        "BEST = 'highest'\n"
        "def config():\n"
        "    config = tiny_config.get_config()\n"  # with a written seed
        "    config.mechanism.steps, config.model.features = 2, ()\n"
        "    return config\n"
        "def cells():\n"
        "    yield from repeated([Cell({'lr': 1.0}, {})], 3)\n"
    )
    out = tmp_path / "runs"
    assert ablate.main([str(source), f"--out={out}"]) == 0
    found = results(out)
    assert [r["repetition"] for r in found] == [0, 1, 2]
    assert [r["flags"] for r in found] == [[], [], []]
    folders = [path for path in out.iterdir() if path.is_dir()]
    first, second, third = (
        load_export(path / "export")["head"]["kernel"] for path in folders
    )
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)
    for path in folders:
        assert sweep.read_json(path / "privacy_card.json")["private"]
    (row,) = summary.rows(found)
    assert (row["runs"], row["n"]) == (3, 3)
    assert summary.caveats([out]) == []
    assert summary.cost([out]).runs == 3
    assert ablate.main([str(source), f"--out={out}"]) == 0
    assert "0 of 3 cells to run" in capsys.readouterr().out


def test_only_runs_one_cell(tmp_path, monkeypatch, capsys):
    source, out = sweep_file(tmp_path), tmp_path / "runs"
    trainer = Trainer(monkeypatch)
    assert ablate.main([source, f"--out={out}", "--only=2"]) == 0
    assert trainer.seen == [(2.0, 1)]
    statuses = [result["status"] for result in results(out)]
    assert statuses == ["missing", "missing", "finished", "missing"]
    assert gather.main([str(out)]) == 1
    output = capsys.readouterr().out
    assert "cell 0 missing" in output
    assert "| 2 | 0.2100 | 1 of 2 | 0.5 |" in output
    # A task of an array must not run cells of another sweep.
    sweep_file(tmp_path, rates=(3.0,))
    assert ablate.main([source, f"--out={out}", "--only=0"]) == 2
    assert "lists other cells" in capsys.readouterr().err


def test_a_folder_holds_one_sweep(tmp_path, monkeypatch, capsys):
    source, out = sweep_file(tmp_path), tmp_path / "runs"
    Trainer(monkeypatch)
    assert ablate.main([source, f"--out={out}"]) == 0
    before = (out / "sweep.json").read_text()
    (tmp_path / "other").mkdir()
    other = sweep_file(tmp_path / "other", rates=(3.0,))
    assert ablate.main([other, f"--out={out}"]) == 2
    assert (
        f"is of the sweep {source}, and a folder holds one" in capsys.readouterr().err
    )
    assert (out / "sweep.json").read_text() == before
    # The same file may change, and a file with the same cells may stand elsewhere.
    assert ablate.main([sweep_file(tmp_path / "other"), f"--out={out}"]) == 0
    sweep_file(tmp_path / "other", rates=(4.0,))
    assert ablate.main([other, f"--out={out}"]) == 0


def test_an_interrupted_cell_is_missing_not_failed(tmp_path, monkeypatch):
    source, out = sweep_file(tmp_path), tmp_path / "runs"

    def stopped(config, folder):
        raise loop.Interrupted("saved step 1 of 2")

    monkeypatch.setattr(loop, "train", stopped)
    assert ablate.main([source, f"--out={out}"]) == 75
    assert {result["status"] for result in results(out)} == {"missing"}


def test_a_result_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    sweep.write_json(path, {"status": "failed"})

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep.write_json(path, {"status": "finished"})
    assert sweep.read_json(path) == {"status": "failed"}
    sweep.write_json(path, {"status": "finished"})
    assert sweep.read_json(path) == {"status": "finished"}


def test_workers_share_the_cells(tmp_path, monkeypatch):
    commands = []

    class Process:
        def __init__(self, command):
            commands.append(command)

        def wait(self):
            return 0 if len(commands) == 1 else 1

        def terminate(self):
            pass

    monkeypatch.setattr(subprocess, "Popen", Process)
    out = tmp_path / "runs"
    assert ablate.main([sweep_file(tmp_path), f"--out={out}", "--workers=3"]) == 1
    shares = [command[-1].removeprefix("--only=").split(",") for command in commands]
    assert sorted(i for share in shares for i in share) == list("0123")
    assert len(shares) == 3
    assert all(f"--out={out}" in command for command in commands)


def test_slurm_gets_an_array_of_what_is_left(tmp_path, monkeypatch, capsys):
    source, out = sweep_file(tmp_path), tmp_path / "runs"
    Trainer(monkeypatch, fail=[(2.0, 2)])
    assert ablate.main([source, f"--out={out}", "--only=1,3"]) == 1
    calls = []
    monkeypatch.setattr(slurm, "submit", lambda job, given: calls.append((job, given)))
    options = ["--workers=2", "--minutes=30", "--sbatch=--mem=8G"]
    command = [str(out), "--resubmit", "--launcher=slurm", *options]
    assert gather.main(command) == 1
    ((job, given),) = calls
    assert job.command[-3:] == (source, f"--out={out}", "--only={index}")
    assert (job.name, job.minutes) == ("sweep", 30)
    assert (given.array, given.sbatch) == ("0,2-3%2", "--mem=8G")
    # What Slurm runs is the command of one cell.
    assert "experiments.ablate" in slurm.render(job, given).text
    monkeypatch.undo()
    missing = [source, f"--out={out}", "--launcher=slurm", "--accelerator=tpu:v5"]
    assert ablate.main(missing) == 2
    assert "slurm takes cpu or gpu" in capsys.readouterr().err


def test_rows_are_means_with_the_interval_of_student(tmp_path, monkeypatch):
    out = tmp_path / "runs"
    Trainer(monkeypatch, fail=[(2.0, 3)])
    ablate.main([sweep_file(tmp_path, seeds=(1, 2, 3)), f"--out={out}"])
    first, second = summary.rows(results(out))
    scores = [0.11, 0.12, 0.13]
    low, high = scipy.stats.t.interval(
        0.95, 2, np.mean(scores), scipy.stats.sem(scores)
    )
    np.testing.assert_allclose(first["mean"], (low + high) / 2)
    np.testing.assert_allclose(first["half_width"], (high - low) / 2)
    assert (first["n"], second["n"], second["runs"]) == (3, 2, 3)
    assert summary.interval([]) == (None, None)
    assert summary.interval([0.5]) == (0.5, None)
    assert "| 1 | 0.1200 ± 0.0248 | 3 | 0.5 |" in summary.table([first, second])


@pytest.mark.parametrize("best", sweep.BESTS)
def test_choice_is_the_best_whole_row_and_knows_its_grid(best):
    def row(method, lr, mean, n=2):
        labels = {"method": method, "lr": lr}
        return {"labels": labels, "mean": mean, "n": n, "runs": 2}

    sign = 1 if best == "highest" else -1
    rows = [
        row("a", 1, sign * 0.2),
        row("a", 2, sign * 0.3),
        row("a", 4, sign * 0.1),
        row("a", 8, sign * 0.9, n=1),  # one of two diverged
        row("b", 1, sign * 0.5),
        row("b", 2, sign * 0.4),
        row("c", 1, sign * 0.4, n=0),
    ]
    kept, choices = summary.choose(rows, ["lr"], best=best)
    assert kept == [rows[1], rows[4]]
    assert choices == [
        {"labels": {"method": "a", "lr": 2}, "rows": 4, "edges": []},
        {"labels": {"method": "b", "lr": 1}, "rows": 2, "edges": ["lr"]},
    ]


def test_gather_writes_rows_choices_cost_and_plot(tmp_path, monkeypatch, capsys):
    out = tmp_path / "runs"
    Trainer(monkeypatch)
    source = sweep_file(tmp_path)
    ablate.main([source, f"--out={out}"])
    # A changed sweep leaves runs behind that were made all the same.
    sweep_file(tmp_path, rates=(2.0, 3.0))
    ablate.main([source, f"--out={out}"])
    files = {name: tmp_path / f"x.{name}" for name in ("json", "png")}
    chosen = tmp_path / "chosen.json"
    arguments = [f"--out={files['json']}", f"--plot={files['png']}", "--x=lr"]
    arguments += ["--lines=lr", "--panels=lr", "--choose=lr", f"--chosen={chosen}"]
    assert gather.main([str(out), *arguments]) == 0
    found = json.loads(files["json"].read_text())
    assert [row["labels"] for row in found["rows"]] == [{"lr": 3.0}]
    assert found["rows"][0]["scores"] == [0.31, 0.32]
    assert found["cost"]["runs"] == 6
    assert found["sweep"] == source
    assert sweep.chosen(chosen) == [{"lr": 3.0}]
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "Cost of the sweep, 6 runs" in output
    assert "! 6 of 6 runs have a written seed" in output
    assert found["caveats"][0].startswith("6 of 6 runs have a written seed")
    assert "at the edge of its grid, ['lr']" in output


def test_a_sweep_without_a_common_epsilon_is_gathered_all_the_same(
    tmp_path, monkeypatch, capsys
):
    out, file = tmp_path / "runs", tmp_path / "x.json"
    Trainer(monkeypatch)
    ablate.main([sweep_file(tmp_path), f"--out={out}"])
    config = next(out.glob("*/config.json"))
    other = json.loads(config.read_text())
    other["mechanism"]["delta"] /= 2
    config.write_text(json.dumps(other))
    assert gather.main([str(out), f"--out={file}"]) == 0
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 2
    assert found["cost"] is None
    assert "the sweep has no cost: delta=" in found["caveats"][-1]
    assert found["caveats"][-1] in capsys.readouterr().out


def test_a_plot_has_all_rows_in_their_panels():
    def row(method, clip, epsilon, mean):
        labels = {"method": method, "clip": clip, "epsilon": epsilon, "lr": clip}
        width = None if mean is None else 0.1
        count = int(mean is not None)
        return {
            "labels": labels,
            "mean": mean,
            "half_width": width,
            "n": count,
            "metric": "test/accuracy" if count else None,
        }

    rows = [row("a", 2, 3.0, 0.2), row("a", 1, 3.0, 0.1), row("b", 1, 5.0, 0.3)]
    rows.append(row("b", 2, 5.0, None))
    figure = summary.draw(rows, x="clip", lines="method", panels="epsilon")
    drawn = [
        [container.lines[0].get_xydata().tolist() for container in axes.containers]
        for axes in figure.axes
    ]
    assert drawn == [[[[1, 0.1], [2, 0.2]]], [[[1.02, 0.3]]]]
    assert [axes.get_title() for axes in figure.axes] == ["epsilon 3", "epsilon 5"]
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    assert len(summary.draw(rows, x="clip", lines="method", panels=None).axes) == 1
    # Two rows at one place of a line would be joined as if one followed from the other.
    rows.append(row("a", 2, 5.0, 0.4))
    with pytest.raises(ValueError, match=r"same clip, method; .*--panels=LABEL"):
        summary.draw(rows, x="clip", lines="method", panels=None)


@pytest.mark.parametrize(("values", "shown"), [((0.5,), 1), (range(10, 22), 6)])
def test_ticks_of_a_plot_are_values_that_do_not_touch(values, shown):
    """One value has a range, too; a long title is not cut off."""
    rows = [
        {
            "labels": {"lr": value, "line": "a", "panel": "a long name " * 9},
            "mean": 0.5,
            "half_width": None,
            "n": 1,
            "metric": "test/accuracy",
        }
        for value in values
    ]
    figure = summary.draw(rows, x="lr", lines="line", panels="panel")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.get_xticklabels(which="both")]
    assert texts == [f"{value:g}" for value in [*values][:: len(values) // shown]]
    boxes = [text.get_window_extent() for text in axes.get_xticklabels()]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
    low, high = axes.get_xlim()
    assert low < min(values) <= max(values) < high < 2 * max(values)
    assert axes.title.get_wrap()


def test_runs_on_public_data_cost_nothing(tmp_path):
    config = tiny("nonprivate")
    facts = {"num_examples": 1437}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(
        json.dumps(config | {"resolved": {"mechanism": facts}})
    )
    assert summary.cost([tmp_path]) is None
    assert "no epsilon" in summary.cost_text(None, [])


def test_the_cost_says_what_it_leaves_out(tmp_path):
    secret = {"run.seed": None}
    runs = {
        "honest": tiny(**secret),
        "seeded": tiny(),
        "scored": tiny(**secret, **{"evaluation.provenance": "private"}),
        "logged": tiny(**secret, **{"run.log_sensitive": True}),
        "started": tiny(**secret, **{"parameters.provenance": "private"}),
        "other data": tiny("nonprivate", **{"data.source.test_fraction": 0.5}),
    }
    facts = {"noise_multiplier": 4.0, "num_examples": 1437}

    def found(*names):
        for file in tmp_path.glob("*/config.json"):
            file.unlink()
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True)
            config = runs[name] | {"resolved": {"mechanism": facts}}
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        return summary.caveats([tmp_path])

    assert found("honest", "other data") == []
    for name, words in {
        "seeded": "have a written seed",
        "scored": "were scored on private data",
        "logged": "logged statistics",
        "started": "start from parameters that were trained on private",
    }.items():
        (caveat,) = found("honest", name)
        assert caveat.startswith(f"1 of 2 runs {words}")
    # Without noise on the very data that other runs protect.
    runs["bare"] = tiny("nonprivate", **secret)
    (caveat,) = found("honest", "bare")
    assert caveat.startswith("1 of 2 runs have the data of private runs, but declared")
    assert f"! {caveat}" in summary.cost_text(summary.cost([tmp_path]), [caveat])
    assert summary.cost([tmp_path]).runs == 1


def test_overrides_replace_values_and_groups_that_exist():
    config = {"a": {"b": 1, "c": (1, 2)}}
    assert sweep.changed(config, {"a.b": 2}) == {"a": {"b": 2, "c": [1, 2]}}
    assert sweep.changed(config, {"a": {"d": 3}, "a.d": 4}) == {"a": {"d": 4}}
    assert config == {"a": {"b": 1, "c": (1, 2)}}
    for path in ("a.d", "b", "a.b.c", "x.y"):
        with pytest.raises(ConfigError, match=f"config.{path} is unknown"):
            sweep.changed(config, {path: 1})
    with pytest.raises(ValueError, match="shorter"):
        list(sweep.zipped(a=(1, 2), b=(1,)))


BODY = textwrap.dedent(SWEEP.format(rates=(1.0,), seeds=(1,)))
WRONG_FILES = {
    "no cells": (BODY.replace("def cells", "def rows"), "does not define cells"),
    "no best": (BODY.replace("BEST", "WORST"), "does not define BEST"),
    "unknown best": (BODY.replace('"highest"', '"best"'), "BEST='best'"),
    "empty": (BODY.replace("(1.0,)", "()"), "yields no cells"),
    "wrong key": (BODY.replace("learning_rate", "lr"), "cell 0 {'lr': 1.0}: config."),
    "wrong value": (
        BODY.replace("optimizer.learning_rate", "mechanism.clip_norm").replace(
            "1.0", "0.0"
        ),
        "cell 0 {'lr': 0.0}: config.mechanism: dpjax.mechanisms:DpSgd: clip_norm=0.0",
    ),
    "same twice": (
        BODY.replace("(1,)", "(1, 1)"),
        "cells 0 and 1 {'lr': 1.0} have one",
    ),
    "variant": (BODY.replace("cells()", "cells(variant)"), "needs a variant"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_wrong_sweep_runs_nothing(case, tmp_path, capsys):
    text, message = WRONG_FILES[case]
    path = tmp_path / "sweep.py"
    path.write_text(text)
    assert ablate.main([str(path), f"--out={tmp_path / 'runs'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_wrong_arguments_are_told(tmp_path, capsys):
    source = sweep_file(tmp_path)
    cells = [{"run": "x", "labels": {"lr": 1}}]
    manifest = {"sweep": source, "best": "max", "cells": cells}
    (tmp_path / "sweep.json").write_text(json.dumps(manifest))
    wrong = {
        "name one sweep": (ablate, []),
        "nope.py is not a file": (ablate, ["nope.py", "--out=x"]),
        "--out=DIR is missing": (ablate, [source]),
        "--ouf=x is unknown": (ablate, [source, "--ouf=x"]),
        "--only=4 must be a cell, 0 to 3": (ablate, [source, "--out=x", "--only=4"]),
        "--workers=0 must be": (ablate, [source, "--out=x", "--workers=0"]),
        "--launcher=pbs is unknown": (ablate, [source, "--out=x", "--launcher=pbs"]),
        "--minutes is for --launcher": (ablate, [source, "--out=x", "--minutes=3"]),
        "--workers is for --resubmit": (gather, [str(tmp_path), "--workers=2"]),
        "has no variant fast": (ablate, [f"{source}:fast", "--out=x"]),
        "name one folder": (gather, []),
        "has no sweep.json": (gather, ["tests"]),
        "--choose=rate is unknown": (gather, [str(tmp_path), "--choose=rate"]),
        "--plot needs --x": (gather, [str(tmp_path), "--plot=x.png"]),
        "--chosen needs": (gather, [str(tmp_path), "--chosen=x.json"]),
    }
    for message, (command, arguments) in wrong.items():
        assert command.main(arguments) == 2
        assert message in capsys.readouterr().err


VARIANTS = {"error_feedback": "digits_tuning", "diff2": "diabetes_tuning"}


@pytest.mark.parametrize("name", VARIANTS)
def test_shipped_sweeps_are_right_and_keep_their_seeds_apart(name):
    path = f"experiments/sweeps/{name}.py"
    found = sweep.load(f"{path}:{VARIANTS[name]}")
    tuning = {run.config["run"]["seed"] for run in found.runs}
    reported = set(runpy.run_path(path)["SEEDS"])
    assert len(reported) >= 5
    assert not tuning & reported


def test_the_sweep_of_few_shots_tunes_on_public_classes_only():
    tuning, found = (
        sweep.load(f"experiments/sweeps/few_shot.py:{variant}").runs
        for variant in ("tuning", "grid")
    )
    assert (len(tuning), len(found)) == (12, 81)
    folders = [
        {run.config["data"]["source"]["source"]["path"] for run in runs}
        for runs in (tuning, found)
    ]
    assert folders == [{"runs/few_shot/public"}, {"runs/few_shot/private"}]
    for run in found:
        rows = 5 * run.config["data"]["source"]["per_class"]
        assert run.config["compute"]["physical_batch_size"] == rows
        assert (run.config["data"]["provenance"] == "public") == (
            run.labels["epsilon"] == "inf"
        )
