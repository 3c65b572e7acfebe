import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from experiments.plots import main


def make_run(directory, *, accuracy=0.9, epsilon=2.0, steps=range(10, 101, 10)):
    directory.mkdir(parents=True)
    with (directory / "metrics.jsonl").open("w") as file:
        for step in steps:
            record = {"step": step, "phase": "diff", "epsilon": epsilon * step / 100}
            if step % 20 == 0:
                record["test/accuracy"] = accuracy * step / 100
            if epsilon == float("inf"):
                record["epsilon"] = "Infinity"
            file.write(json.dumps(record) + "\n")
    return directory


def colours(path):
    with PIL.Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (1350, 570)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    values, counts = np.unique(pixels, axis=0, return_counts=True)
    # A line covers many pixels with exactly its colour; smoothed edges do not.
    return {f"#{r:02X}{g:02X}{b:02X}" for r, g, b in values[counts > 200].tolist()}


def test_one_colour_per_run(tmp_path, capsys):
    runs = [make_run(tmp_path / f"run{i}", accuracy=0.5 + i / 10) for i in range(2)]
    out = tmp_path / "out.png"
    assert main([*map(str, runs), f"--out={out}"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert {"#0072B2", "#D55E00"} <= colours(out)
    assert main([str(runs[0]), f"--out={out}"]) == 0
    assert "#D55E00" not in colours(out)


def figure_of(monkeypatch, arguments):
    """Run the command and return the figure that it saved."""
    import matplotlib.figure

    saved = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *_, **__: saved.append(self)
    )
    assert main(arguments) == 0
    (figure,) = saved
    return figure


def test_draws_the_recorded_points_of_each_panel(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", accuracy=0.5, epsilon=2.0)
    figure = figure_of(monkeypatch, [str(run)])
    left, right = figure.axes
    (metric,), (epsilon,) = left.lines, right.lines
    np.testing.assert_array_equal(metric.get_xdata(), [20, 40, 60, 80, 100])
    np.testing.assert_allclose(metric.get_ydata(), [0.1, 0.2, 0.3, 0.4, 0.5])
    np.testing.assert_array_equal(epsilon.get_xdata(), range(10, 101, 10))
    np.testing.assert_allclose(epsilon.get_ydata()[-1], 2.0)
    assert left.get_title() == "test/accuracy"
    assert "epsilon" in right.get_title()


@pytest.mark.parametrize(
    ("directories", "names"),
    [(["a/one", "b/two"], ["one", "two"]), (["a/run", "b/run"], ["a/run", "b/run"])],
)
def test_the_legend_names_each_run_and_its_end(
    tmp_path, monkeypatch, directories, names
):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / directories[0], epsilon=3.0)
    # The last evaluation of a run in progress is older than its last record.
    make_run(tmp_path / directories[1], epsilon=1.0, steps=range(10, 60, 10))
    figure = figure_of(monkeypatch, directories)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        f"{names[0]}: 0.9 at epsilon 3",
        f"{names[1]}: 0.36 at epsilon 0.4",
    ]


def test_infinite_epsilon_is_not_drawn(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", epsilon=float("inf"))
    figure = figure_of(monkeypatch, [str(run)])
    (line,) = figure.axes[1].lines
    assert len(line.get_xdata()) == 0
    assert [text.get_text() for text in figure.axes[1].texts] == ["no finite epsilon"]
    (text,) = figure.legends[0].get_texts()
    assert text.get_text() == "run: 0.9"


def test_another_metric(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    figure = figure_of(monkeypatch, [str(run), "--metric=epsilon"])
    assert figure.axes[0].get_title() == "epsilon"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no run directory given"),
        (["absent"], "absent is not a run: it has no metrics.jsonl"),
        (
            ["run", "--metric=test/acc"],
            "run/metrics.jsonl has no test/acc; --metric can be any of: epsilon, "
            "test/accuracy",
        ),
        (["run", "--colour=red"], "--colour=red is unknown; "),
        (["run", "--out="], "--out has no value; use --out=..."),
        (["run", "--out=plot.pdf"], "--out=plot.pdf must end with .png"),
        (["run", "--out=absent/plot.png"], "is in a directory that is absent"),
        (["torn"], "torn/metrics.jsonl, line 1 is not a record"),
        (
            ["fresh"],
            "fresh/metrics.jsonl has no test/accuracy; --metric can be any of: ",
        ),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    make_run(tmp_path / "fresh", steps=[])
    make_run(tmp_path / "torn", steps=[])
    (tmp_path / "torn" / "metrics.jsonl").write_text("{\n{}\n")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "status"), [(["--help"], 0), (["absent"], 2), (["run", "-o"], 2)]
)
def test_help_and_errors_come_before_heavy_imports(arguments, status):
    code = (
        "import sys; from experiments.plots import main; "
        f"status = main({arguments}); "
        "heavy = {'matplotlib', 'numpy', 'jax'} & set(sys.modules); "
        "sys.exit(99 if heavy else status)"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stderr
    assert ("--metric=NAME" in result.stdout) == (status == 0)
