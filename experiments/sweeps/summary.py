"""What a sweep found: rows over seeds, choices, the cost of the search, a plot."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.shared.report import COLOURS, markdown, tidy
from experiments.sweeps import sweep

if TYPE_CHECKING:
    from dpjax.privacy.accounting import TuningCost

Rows = list[dict[str, Any]]
_CONFIDENCE = 0.95
_MARKERS = "os^vDPX"


def results(manifest: Mapping[str, Any], directory: Path) -> Rows:
    """Return the result of each cell; of one that has none, its status is missing."""
    found = []
    for index, cell in enumerate(manifest["cells"]):
        path = directory / cell["run"] / sweep.RESULT
        result = {"status": "missing", "error": None, "score": None}
        if path.exists():
            result = sweep.read_json(path)
        found.append({**result, "index": index, "labels": cell["labels"]})
    return found


def rows(found: Rows) -> Rows:
    """Return one row for each combination of labels, in order of appearance.

    A row has ``labels``, ``n`` finished runs of ``runs``, ``mean`` and ``half_width`` of
    the confidence interval (None where there are too few), the ``metric``, the largest
    ``epsilon`` and whether all are ``proven``.
    """
    groups: dict[str, Rows] = {}
    for result in found:
        groups.setdefault(json.dumps(result["labels"]), []).append(result)
    return [_row(group) for group in groups.values()]


def interval(scores: Sequence[float]) -> tuple[float | None, float | None]:
    """Return mean and half-width of the 95% interval of Student's t.

    >>> interval([1.0, 2.0, 3.0])
    (2.0, 2.4841377117503685)
    """
    from scipy import stats

    if not scores:
        return None, None
    mean = statistics.fmean(scores)
    if len(scores) == 1:
        return mean, None
    quantile = stats.t.ppf((1 + _CONFIDENCE) / 2, len(scores) - 1)
    error = statistics.stdev(scores) / math.sqrt(len(scores))
    return mean, float(quantile * error)


def choose(found: Rows, tuned: Sequence[str], *, best: str) -> tuple[Rows, Rows]:
    """Keep the best of the rows that differ in the labels ``tuned`` only.

    A row with an unfinished run is no candidate: it may have diverged.

    Returns:
        The rows kept, and for each: its labels, how many rows there were to choose from,
        and the tuned labels of which it has the least or the greatest value tried.
    """
    sign = 1 if best == "highest" else -1
    groups: dict[str, Rows] = {}
    for row in found:
        rest = {name: v for name, v in row["labels"].items() if name not in tuned}
        groups.setdefault(json.dumps(rest), []).append(row)
    kept, choices = [], []
    for group in groups.values():
        whole = [row for row in group if row["n"] == row["runs"]]
        if not whole:
            continue
        winner = max(whole, key=lambda row: sign * row["mean"])
        kept.append(winner)
        edges = [name for name in tuned if _at_edge(winner, group, name)]
        choices.append({"labels": winner["labels"], "rows": len(group), "edges": edges})
    return kept, choices


def _at_edge(winner: Mapping[str, Any], group: Rows, label: str) -> bool:
    tried = {row["labels"].get(label) for row in group} - {None}
    return len(tried) > 1 and winner["labels"][label] in (min(tried), max(tried))


def table(found: Rows) -> str:
    """Return the rows as a Markdown table."""
    labels = list(dict.fromkeys(name for row in found for name in row["labels"]))
    metrics = [row["metric"] for row in found if row["metric"]]
    head = [*labels, metrics[0] if metrics else "score", "n", "epsilon"]
    lines = []
    for row in found:
        shown = [_number(row["labels"].get(name)) for name in labels]
        counted = str(row["n"])
        if row["n"] < row["runs"]:
            counted += f" of {row['runs']}"
        claimed = "" if row["proven"] else " claimed"
        lines.append([*shown, _score(row), counted, _number(row["epsilon"]) + claimed])
    return markdown(head, lines).rstrip("\n")


def cost(directories: Sequence[Path]) -> "TuningCost | None":
    """Return what all runs that began in these folders cost together, if private."""
    from dpjax.privacy.accounting import tuning_cost

    mechanisms = [
        mechanism(config) for config in _begun(directories) if protects(config)
    ]
    return tuning_cost(mechanisms) if mechanisms else None


def caveats(directories: Sequence[Path]) -> list[str]:
    """Return what the cost of these runs leaves out."""
    configs = _begun(directories)
    private = [config for config in configs if protects(config)]
    sources = [config["data"]["source"] for config in private]
    counts = {
        "have a written seed: their noise protects nobody, and epsilon is what it would be "
        "with secret ones": sum(c["run"]["seed"] is not None for c in private),
        "were scored on private data without noise: what is chosen by such scores tells of "
        "these data": sum(c["evaluation"]["provenance"] == "private" for c in private),
        "logged statistics of training examples": sum(
            c["run"]["log_sensitive"] for c in private
        ),
        "start from parameters that were trained on private data": sum(
            c["parameters"]["provenance"] == "private" for c in private
        ),
        "have the data of private runs, but declared public: nothing here holds for what is "
        "chosen or published of them": sum(
            not protects(c) and c["data"]["source"] in sources for c in configs
        ),
    }
    return [f"{n} of {len(configs)} runs {text}" for text, n in counts.items() if n]


def cost_text(found: "TuningCost | None", caveats: Sequence[str]) -> str:
    """Return the cost of a sweep in words, with what it leaves out."""
    if found is None:
        return "\nNo run protected private data: the sweep has no epsilon."
    lines = [
        f"Cost of the sweep, {found.runs} runs, delta {found.delta:g}: epsilon",
        f"  {found.dearest:6.2f}  of the dearest run, had it been the only one",
        f"  {found.composed:6.2f}  of all runs: what holds for anything chosen among them",
    ]
    lines += [
        f"  {epsilon:6.2f}  of the best of each plan, had the number of trials been "
        f"{name} of this mean and only the best been seen"
        for name, epsilon in found.selected.items()
    ]
    if found.analysed < found.runs:
        rest = found.runs - found.analysed
        lines.append(f"  (the last without {rest} runs, which RDP cannot analyse)")
    if found.claimed:
        lines.append(
            f"  (claimed: the epsilons of {found.claimed} runs rest on assumptions, and "
            "these with them)"
        )
    lines += [f"  ! {caveat}" for caveat in caveats]
    return "\n" + "\n".join(lines)


def cost_facts(found: "TuningCost | None") -> dict[str, Any] | None:
    """Return the cost as JSON-able facts."""
    return None if found is None else dataclasses.asdict(found)


def provenance(found: Rows) -> dict[str, Any]:
    """Return the commits, versions and time of the finished runs."""
    done = [result for result in found if result["status"] == "finished"]
    commits = sorted({str(result["git"]["commit"]) for result in done})
    return {
        "commits": commits,
        "versions": done[0]["versions"] if done else {},
        "run_seconds": round(sum(result["seconds"] for result in done)),
    }


def draw(found: Rows, *, x: str, lines: str, panels: str | None) -> Any:
    """Return a matplotlib figure of the rows, with their confidence intervals.

    Args:
        found: Rows with positive numbers under the label ``x``.
        x: Label of the horizontal axis, which is logarithmic.
        lines: Label with a line for each of its values.
        panels: Label with a panel for each of its values; None for one panel.

    Raises:
        ValueError: Several rows would be one point of a line.
    """
    from matplotlib.figure import Figure

    axes_of = [name for name in (x, lines, panels) if name is not None]
    points = [tuple(r["labels"][name] for name in axes_of) for r in found if r["n"]]
    if len(set(points)) < len(points):
        raise ValueError(
            f"--plot: several rows have the same {', '.join(axes_of)}; tell them apart by "
            "--panels=LABEL, or keep the best by --choose=LABEL"
        )
    parts: dict[str, Rows] = {}
    for row in found:
        name = "" if panels is None else f"{panels} {_number(row['labels'][panels])}"
        parts.setdefault(name, []).append(row)
    figure = Figure(figsize=(3 + 3 * len(parts), 4.4), layout="constrained")
    grid = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(row["labels"][lines] for row in found))
    handles = {}
    for axes, (title, part) in zip(grid, parts.items(), strict=True):
        axes.set_xscale("log")
        _mark(axes, sorted({row["labels"][x] for row in part}))
        for i, name in enumerate(names):
            chosen = [row for row in part if row["labels"][lines] == name]
            if any(row["n"] for row in chosen):
                handles[name] = _line(axes, chosen, x, i)
        axes.set_title(title, wrap=True)
        axes.set_xlabel(x)
        tidy(axes)
    grid[0].set_ylabel(next(row["metric"] for row in found if row["metric"]))
    figure.legend(
        handles.values(),
        map(str, handles),
        loc="outside lower center",
        ncols=min(2 if len(parts) < 2 else 3, len(handles)),
        frameon=False,
    )
    return figure


def _mark(axes: Any, at: Sequence[float]) -> None:
    """Put ticks where the values are: those between would be unmeasured, and collide."""
    step = -(-len(at) // 6)  # more labels than these touch each other
    axes.set_xticks(at[::step], [f"{value:g}" for value in at[::step]])
    axes.set_xticks([], minor=True)
    axes.set_xlim(at[0] / 1.3, at[-1] * 1.3)  # one value alone has no range of its own


def _line(axes: Any, part: Rows, x: str, i: int) -> Any:
    points = [(r["labels"][x], r["mean"], r["half_width"] or 0) for r in part if r["n"]]
    at, means, widths = zip(*sorted(points), strict=True)
    spread = 1 + 0.02 * i  # so that intervals at one place do not hide each other
    return axes.errorbar(
        [value * spread for value in at],
        means,
        yerr=widths,
        marker=_MARKERS[i % len(_MARKERS)],
        markersize=4,
        capsize=2,
        color=COLOURS[i % len(COLOURS)],
    )


def _row(group: Rows) -> dict[str, Any]:
    done = [result for result in group if result["status"] == "finished"]
    scores = [result["score"] for result in done]
    mean, half_width = interval(scores)
    return {
        "labels": group[0]["labels"],
        "runs": len(group),
        "n": len(done),
        "mean": mean,
        "half_width": half_width,
        "scores": scores,
        "metric": done[0]["metric"] if done else None,
        "epsilon": max((float(r["epsilon"]) for r in done), default=None),
        "proven": all(result["proven"] for result in done),
    }


def _begun(directories: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the configs of all runs that began."""
    paths = [p for folder in directories for p in sorted(folder.glob("*/config.json"))]
    return [sweep.read_json(path) for path in paths]


def protects(config: Mapping[str, Any]) -> bool:
    """Return whether a run had private data, and so noise: each is refused alone."""
    return config["data"]["provenance"] == "private"


def mechanism(config: Mapping[str, Any]) -> Any:
    """Build the mechanism that a run resolved, its noise as it was."""
    from dpjax.training.config import build

    spec, facts = dict(config["mechanism"]), config["resolved"]["mechanism"]
    spec.pop("epsilon", None)
    if "noise_multiplier" in facts:
        spec["noise_multiplier"] = facts["noise_multiplier"]
    return build(spec, num_examples=facts["num_examples"])


def _score(row: Mapping[str, Any]) -> str:
    if row["mean"] is None:
        return "-"
    if row["half_width"] is None:
        return f"{row['mean']:.4f}"
    return f"{row['mean']:.4f} ± {row['half_width']:.4f}"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
