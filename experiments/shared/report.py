"""Tables and pictures that the commands share, and those of the benchmark."""

from collections.abc import Iterable, Sequence
from typing import Any

Rows = Sequence[dict[str, Any]]

# Okabe and Ito's palette, which the colour-blind can tell apart, without yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, with a line break at its end."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tidy(axes: Any) -> None:
    """Give matplotlib axes a pale grid, and no frame above and to the right."""
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def print_table(rows: Rows) -> None:
    """Print rows of the same columns; a dash where there is no value."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    columns = [*rows[0]]
    for column in columns:
        table.add_column(column, justify="left" if column in _NAMES else "right")
    for row in rows:
        table.add_row(*(_text(row[column]) for column in columns))
    # Where the output is no terminal, rich would fold the table to 80 columns.
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)


def draw(rows: Rows) -> Any:
    """Return a matplotlib figure: bars of the time ratios, grouped by workload."""
    from matplotlib.figure import Figure

    bars = {(row["workload"], _kind(row)): row["time_ratio"] for row in _timed(rows)}
    workloads, kinds = (list(dict.fromkeys(names)) for names in zip(*bars, strict=True))
    figure = Figure(figsize=(2 + 1.8 * len(workloads), 3.8), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    width = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        at = [w for w, name in enumerate(workloads) if (name, kind) in bars]
        ratios = [bars[workloads[w], kind] for w in at]
        # Bars start at the baseline: on a logarithmic axis there is no zero.
        drawn = axes.bar(
            [w + (i + 0.5) * width - 0.4 for w in at],
            [ratio - 1 for ratio in ratios],
            width=width,
            bottom=1,
            color=COLOURS[i % len(COLOURS)],
            label=kind,
        )
        axes.bar_label(drawn, [f"{r:.3g}" for r in ratios], fontsize=7)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_ylabel("time / best without privacy")
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(3, len(kinds)), frameon=False)
    return figure


def _timed(rows: Rows) -> list[dict[str, Any]]:
    """Return the rows of engines, which have errors, that were run."""
    return [row for row in rows if row["max_rel_error"] is not None]


def _kind(row: dict[str, Any]) -> str:
    # Of the sizes of microbatches only the best was measured: they share a colour.
    engine, sliced, _ = row["engine"].partition("_mb")
    return f"{engine}, microbatches" if sliced else engine


_NAMES = ("workload", "engine")


def _text(value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
