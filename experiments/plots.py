"""Plot a metric and epsilon against the steps of one or several runs.

    python -m experiments.plots DIR... [--out=FILE.png] [--metric=NAME]

DIR            a run directory, holding metrics.jsonl
--out=FILE     the picture to write; plots.png if not given
--metric=NAME  what to plot besides epsilon; test/accuracy if not given

Exit status: 0 done, 2 wrong arguments or input.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpjax.training.metrics import read_jsonl
from experiments.shared import options
from experiments.shared.report import COLOURS, tidy

_DASHES = ("-", "--", ":", "-.")


class Curve(NamedTuple):
    """Values of one key against steps; records without the key are not in it."""

    steps: list[int]
    values: list[float]


class Run(NamedTuple):
    """What is drawn of one run."""

    name: str
    metric: Curve
    epsilon: Curve


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    return options.command(argv, __doc__, _loaded, lambda asked: _plot(*asked))


def _loaded(argv: list[str]) -> tuple[list[Run], Path, str]:
    found, given = options.split(argv, ("out", "metric"))
    if not found:
        raise ValueError("no run directory given: see --help")
    out = options.file("out", given.get("out", "plots.png"), ".png")
    metric, directories = given.get("metric", "test/accuracy"), [*map(Path, found)]
    named = zip(directories, _short_names(directories), strict=True)
    return [_load(folder, name, metric) for folder, name in named], out, metric


def _plot(runs: Sequence[Run], out: Path, metric: str) -> int:
    draw(runs, metric=metric).savefig(out, dpi=150)
    print(out)
    return 0


def draw(runs: Sequence[Run], *, metric: str) -> Any:
    """Return a matplotlib figure: the metric on the left, epsilon on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for i, run in enumerate(runs):
        style = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": _DASHES[i // len(COLOURS) % len(_DASHES)],
            "linewidth": 2,
        }
        left.plot(*run.metric, label=_label(run), marker="o", markersize=4, **style)
        right.plot(*run.epsilon, **style)
    left.set_title(metric)
    right.set_title("privacy spent: epsilon")
    right.set_ylim(bottom=0)
    if not any(run.epsilon.steps for run in runs):
        right.set_yticks([])
        right.text(
            0.5, 0.5, "no finite epsilon", ha="center", transform=right.transAxes
        )
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        tidy(axes)
    figure.legend(loc="outside lower center", ncols=min(2, len(runs)), frameon=False)
    return figure


def _short_names(directories: Sequence[Path]) -> list[str]:
    names = [directory.resolve().name for directory in directories]
    return names if len(set(names)) == len(names) else list(map(str, directories))


def _load(directory: Path, name: str, metric: str) -> Run:
    path = directory / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{directory} is not a run: it has no metrics.jsonl")
    records = read_jsonl(path)
    run = Run(name, _curve(records, metric), _curve(records, "epsilon"))
    if not run.metric.steps:
        known = {key for r in records for key, value in r.items() if _is_finite(value)}
        known = ", ".join(sorted(known - {"step"})) or "nothing yet"
        raise ValueError(f"{path} has no {metric}; --metric can be any of: {known}")
    return run


def _curve(records: Sequence[dict[str, Any]], key: str) -> Curve:
    points = [(r["step"], r[key]) for r in records if _is_finite(r.get(key))]
    return Curve([step for step, _ in points], [value for _, value in points])


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _label(run: Run) -> str:
    epsilon = dict(zip(*run.epsilon, strict=True)).get(run.metric.steps[-1])
    at = "" if epsilon is None else f" at epsilon {epsilon:.3g}"
    return f"{run.name}: {run.metric.values[-1]:.4g}{at}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
