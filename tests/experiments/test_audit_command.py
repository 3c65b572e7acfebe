"""The command: report, exit status and errors."""

import json

import pytest

from experiments import audit
from tests.runs import ROOT

DIGITS = "--config=configs/digits_mlp_dpsgd.py"
FAST = [
    "--config.mechanism.steps=4",
    "--config.mechanism.epsilon=None",
    "--config.mechanism.noise_multiplier=2",
    "--trials=2000",
]


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_an_honest_config_is_consistent(tmp_path, capsys):
    assert audit.main([DIGITS, *FAST, f"--out={tmp_path}", "--attack=likelihood"]) == 0
    assert "consistent; report in" in capsys.readouterr().out
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["verdict"] == "consistent"
    assert found["claimed"]["delta"] == 1e-5
    (finding,) = found["findings"]
    assert 0 <= finding["lower_bound"] < found["claimed"]["epsilon"]
    assert finding["roc"][0] == [0, 0]
    assert (tmp_path / "audit.png").stat().st_size > 10_000
    assert "# Audit: consistent" in (tmp_path / "audit.md").read_text()


def test_scores_of_another_attack_are_judged(tmp_path, capsys):
    """Of an attack that is always right: status 1."""
    for name, scores in (("in", "1\n" * 3000), ("out", "0\n" * 3000)):
        (tmp_path / name).write_text(scores)
    files = f"--scores={tmp_path / 'in'},{tmp_path / 'out'}"
    assert audit.main([DIGITS, *FAST[:-1], f"--out={tmp_path}", files]) == 1
    assert "VIOLATED" in capsys.readouterr().out
    (tmp_path / "out").write_text("0\n" * 2999)
    assert audit.main([DIGITS, *FAST[:-1], f"--out={tmp_path}", files]) == 2
    assert "must be two arrays of one length" in capsys.readouterr().err


def test_canaries_of_a_real_run_are_judged(tmp_path):
    argv = [DIGITS, *FAST[:-1], "--attack=dirac", f"--out={tmp_path}"]
    assert audit.main(argv) == 0
    (finding,) = json.loads((tmp_path / "audit.json").read_text())["findings"]
    assert finding["attack"] == "dirac"


WRONG = {
    "not private": ([f"{DIGITS}:nonprivate"], "NOT PRIVATE"),
    "seeded": ([DIGITS, *FAST, "--config.run.seed=1"], "seed=1"),
    "no directory": ([DIGITS], "--out=DIR is missing"),
    "unknown option": ([DIGITS, "--trails=3"], "did you mean 'trials'"),
    "unknown attack": ([DIGITS, "--attack=reus"], "did you mean 'reuse'"),
    "one file of scores": ([DIGITS, "--scores=a.txt"], "must name two files"),
    "scores and attack": (
        [DIGITS, "--scores=a,b", "--attack=reuse"],
        "leave out --attack",
    ),
    "no such scores": ([DIGITS, *FAST[:-1], "--scores=a.txt,b.txt"], "a.txt"),
    "no trials": ([DIGITS, "--trials=0"], "--trials=0 must be an integer"),
    "too few trials": ([DIGITS, *FAST[:-1], "--trials=4"], "are needed"),
    "too few canaries": (
        [DIGITS, "--attack=dirac", "--canaries=200"],
        "cannot refute epsilon=3: at least 2",
    ),
    "confidence": ([DIGITS, "--confidence=99"], "--confidence=99 must be strictly"),
    "seed": ([DIGITS, "--seed=x"], "--seed=x must be an integer"),
    "dry run": ([DIGITS, "--config.run.dry_run=True"], "an audit makes nothing but"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line(name, tmp_path, capsys):
    argv, message = WRONG[name]
    out = [] if name == "no directory" else [f"--out={tmp_path / 'out'}"]
    assert audit.main([*argv, *out]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "out").exists()
