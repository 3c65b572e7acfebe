"""The tables of experiments/results/audit.md: what attacks find in what ships.

    python -m experiments.audits.tables --out=DIR [--suite=A,B] [--mnist=FILE.npz]

--out=DIR          receives NAME.json, NAME.md and, for some, NAME.png for each suite
--suite=A,B        mechanisms, canaries, intervals, membership, exposure, inversion, referee,
                   ew_tune; all if not given
--mnist=FILE.npz   Keras' layout; membership and inversion use digits alone without it

Exit status: 0 done, 2 wrong arguments or input.
"""

import itertools
import math
import sys
from pathlib import Path
from typing import Any

from experiments.audits.suites import SUITES, Rows, Sources
from experiments.shared import options, report
from experiments.sweeps import sweep


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    return options.command(argv, __doc__, _asked, lambda asked: _run(*asked))


def _asked(argv: list[str]) -> tuple[Path, list[str], Sources]:
    given = options.read(argv, ("out", "suite", "mnist"))
    if "out" not in given:
        raise ValueError("--out=DIR is missing; see --help")
    suites = options.choices("suite", given.get("suite"), SUITES)
    return Path(given["out"]), suites, _sources(given.get("mnist"))


def _run(out: Path, suites: list[str], sources: Sources) -> int:
    out.mkdir(parents=True, exist_ok=True)
    for name in suites:
        rows = SUITES[name](sources)
        sweep.write_json(out / f"{name}.json", rows)
        (out / f"{name}.md").write_text(markdown(rows))
        if name in _PLOTS:
            _draw(rows, **_PLOTS[name]).savefig(out / f"{name}.png", dpi=150)
        print(out / f"{name}.md", flush=True)
    return 0


def markdown(rows: Rows) -> str:
    """Return rows as a table."""
    columns = list(rows[0])
    lines = [[_text(row[column]) for column in columns] for row in rows]
    return report.markdown(columns, lines)


_PLOTS: dict[str, dict[str, Any]] = {
    "membership": {"x": "epsilon", "ys": ("AUC, loss", "AUC, LiRA"), "by": ()},
    "inversion": {"x": "sigma", "ys": ("linear layer", "descent"), "by": ("batch",)},
}


def _sources(mnist: str | None) -> Sources:
    from dpjax.data.arrays import digits, npz

    found: Sources = {"digits": digits(split="train", test_fraction=0.2)}
    if mnist is not None:
        found["MNIST"] = npz(path=mnist, split="train")
    return found


def _draw(rows: Rows, *, x: str, ys: tuple[str, ...], by: tuple[str, ...]) -> Any:
    """Draw a panel for each data set: a colour for each of ``by``, a dash for each of ys."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    panels = list(dict.fromkeys(row["data"] for row in rows))
    for axes, panel in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0],
        panels,
        strict=True,
    ):
        of_panel = [row for row in rows if row["data"] == panel]
        ticks = list(dict.fromkeys(row[x] for row in of_panel))
        groups = list(dict.fromkeys(_of(row, by) for row in of_panel))
        for (i, group), (j, y) in itertools.product(enumerate(groups), enumerate(ys)):
            of_group = [row for row in of_panel if _of(row, by) == group]
            axes.plot(
                [ticks.index(row[x]) for row in of_group],
                [row[y] for row in of_group],
                ("-", "--")[j],
                marker="o",
                color=report.COLOURS[i if by else j],
                label=", ".join([*group, y]),
            )
        axes.set_xticks(range(len(ticks)), [_text(tick) for tick in ticks])
        axes.set_xlabel(x)
        axes.set_title(panel, loc="left")
        report.tidy(axes)
    lines, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        lines, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=7
    )
    return figure


def _of(row: dict[str, Any], by: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{key} {_text(row[key])}" for key in by)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else str(value)
    return str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
