"""Where the scalars of a run go: JSON lines always, other writers on request.

Per-example values are private. Everything here takes plain scalars only, so that a
`PerExample` or an array cannot be written by mistake.

This module must import without jax.
"""

import contextlib
import difflib
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Scalars = Mapping[str, float | int | str]


class Writer(Protocol):
    """Takes the scalars of a step."""

    def write(self, step: int, scalars: Scalars) -> None:
        """Write the scalars of one step."""

    def close(self) -> None:
        """Finish; `write` must not be called again."""


class JsonlWriter:
    """Appends one JSON object per line, ``{"step": 1, "epsilon": 0.5}``, and flushes it.

    The JSON is strict: what is not finite becomes "NaN", "Infinity" or "-Infinity".

    Args:
        path: Created if absent. Records after ``resume_step`` are removed, for they are
            about to be written again, and so is a line that a crash cut off.
        resume_step: The step from which the run goes on; 0 for a new run.

    Raises:
        ValueError: A line that was there is not a record.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            kept = [r for r in read_jsonl(path) if r["step"] <= resume_step]
        unfinished = path.with_name(f"{path.name}.unfinished")
        unfinished.write_text("".join(map(_line, kept)), encoding="utf-8")
        unfinished.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, scalars: Scalars) -> None:
        """Append the record of one step.

        Raises:
            TypeError: A value is not a plain scalar.
            ValueError: A scalar is named "step".
        """
        if "step" in scalars:
            raise ValueError('scalar name "step" is taken: use another')
        self._file.write(_line({"step": step, **plain_scalars(scalars)}))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the records that `JsonlWriter` wrote; a last line that was cut off is not one.

    Raises:
        ValueError: Another line is not a JSON object with a step.
    """
    *lines, tail = path.read_text(encoding="utf-8").split("\n")
    records = [_record(line, path, i) for i, line in enumerate(lines, start=1)]
    with contextlib.suppress(ValueError):  # without a newline it may be cut off
        records.append(_record(tail, path, len(lines) + 1))
    return records


class TensorBoardWriter:
    """Writes TensorBoard event files, with tensorboardX.

    The time of an event is its step: how long steps took depends on the batches drawn.

    Args:
        directory: Where the event files go.
        resume_step: Events after this step are hidden.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self, directory: Path, *, resume_step: int = 0) -> None:
        tensorboard = _import("tensorboardX", extra="tensorboard")
        self._writer = tensorboard.SummaryWriter(
            str(directory), purge_step=resume_step + 1
        )

    def write(self, step: int, scalars: Scalars) -> None:
        """Add the scalars of one step; raises TypeError as `JsonlWriter.write` does."""
        for name, value in plain_scalars(scalars).items():
            if isinstance(value, str):
                self._writer.add_text(name, value, step, walltime=step)
            else:
                self._writer.add_scalar(name, value, step, walltime=step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbWriter:
    """Logs to Weights & Biases.

    Args:
        directory: Where wandb keeps its files.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, directory: Path) -> None:
        wandb = _import("wandb", extra="wandb")
        directory.mkdir(parents=True, exist_ok=True)  # else wandb goes elsewhere
        self._run = wandb.init(project="dpjax", dir=str(directory))

    def write(self, step: int, scalars: Scalars) -> None:
        """Log the scalars of one step; raises TypeError as `JsonlWriter.write` does."""
        self._run.log(plain_scalars(scalars), step=step)

    def close(self) -> None:
        """Finish the wandb run."""
        self._run.finish()


def writers(
    names: Sequence[str],
    directory: Path,
    *,
    resume_step: int = 0,
    silent: bool = False,
) -> "AllWriters":
    """Open ``directory/metrics.jsonl`` and the named writers, as one writer.

    Args:
        names: Any of "tensorboard" and "wandb".
        directory: Where all of them write.
        resume_step: The step from which the run goes on; 0 for a new run.
        silent: Open none: another process of the run writes.

    Raises:
        ValueError: A name is unknown.
        ImportError: The package behind a name is not installed.
    """
    optional: dict[str, Callable[[], Writer]] = {
        "tensorboard": lambda: TensorBoardWriter(directory, resume_step=resume_step),
        "wandb": lambda: WandbWriter(directory),
    }
    for name in names:
        if name not in optional:
            raise ValueError(_unknown(name, list(optional)))
    if silent:
        return AllWriters([], contextlib.ExitStack())
    with contextlib.ExitStack() as stack:  # closes what is open if the next fails
        opened: list[Writer] = [
            JsonlWriter(directory / "metrics.jsonl", resume_step=resume_step)
        ]
        stack.callback(opened[0].close)
        for name in names:
            opened.append(optional[name]())
            stack.callback(opened[-1].close)
        return AllWriters(opened, stack.pop_all())


class AllWriters(contextlib.AbstractContextManager):
    """Passes everything on to several writers. Made by `writers`."""

    def __init__(self, each: Sequence[Writer], closing: contextlib.ExitStack) -> None:
        self._each, self._closing = each, closing

    def write(self, step: int, scalars: Scalars) -> None:
        """Write the scalars of one step to all; what the first refuses, none gets."""
        for writer in self._each:
            writer.write(step, scalars)

    def close(self) -> None:
        """Close all."""
        self._closing.close()

    def __exit__(self, *_: object) -> None:
        self.close()


class Progress(contextlib.AbstractContextManager):
    """Shows how far a run is on stderr: one live line on a terminal, else plain lines.

    Nothing is drawn by a thread of its own: while another package imports lazily (Grain and
    TFDS replace ``__import__`` for a moment), imports of any other thread fail.

    Args:
        total_steps: The last step of the run.
        start: The step from which the run goes on.
        silent: Show nothing: another process of the run does.
    """

    def __init__(
        self, total_steps: int, *, start: int = 0, silent: bool = False
    ) -> None:
        self._total, self._start, self._silent = total_steps, start, silent
        self._began = time.monotonic()
        self._clock_start = start, self._began
        self._warm = False
        self._live: Any = None
        self._latest: dict[str, str] = {}

    def __enter__(self) -> "Progress":
        if self._silent:
            return self
        if self._start:
            said = f"goes on from step {self._start} of {self._total}"
            print(said, file=sys.stderr, flush=True)
        if sys.stderr.isatty():
            self._live = _live_line(self._total, self._start)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, step: int, scalars: Scalars) -> None:
        """Show ``step`` and its scalars, what matters most first.

        A line on a terminal, which may cut off its end, keeps scores until there are new ones.

        Raises:
            TypeError: A value is not a plain scalar.
        """
        shown = {name: _short(v) for name, v in plain_scalars(scalars).items()}
        if self._silent:
            return
        now = time.monotonic()
        if self._live is not None:
            shown = self._latest = self._latest | shown
        # A score is named SPLIT/METRIC; a stable sort leaves the rest as it came.
        names = sorted(shown, key=lambda n: (n != "epsilon", not _is_score(n)))
        first = [n for n in names if n == "epsilon" or _is_score(n)]
        parts = [f"step {step}/{self._total}"]
        parts += [f"{name} {shown[name]}" for name in first]
        parts.append(f"eta {self._remaining(step, now)}")
        parts.append(f"elapsed {_clock(now - self._began)}")
        parts += [f"{name} {shown[name]}" for name in names if name not in first]
        if self._live is None:
            print("  ".join(parts), file=sys.stderr, flush=True)
        else:
            (task,) = self._live.task_ids
            text = "  ".join(parts)
            self._live.update(task, completed=step, description=text, refresh=True)

    def _remaining(self, step: int, now: float) -> str:
        first_step, first_time = self._clock_start
        if not self._warm:  # steps that compile say nothing about those that follow
            self._clock_start, self._warm = (step, now), True
        if step == first_step:
            return "?"
        return _clock((self._total - step) * (now - first_time) / (step - first_step))


def plain_scalars(scalars: Mapping[str, Any]) -> dict[str, float | int | str]:
    """Return the scalars as Python values; arrays with an axis are not scalars.

    Raises:
        TypeError: A value is not a float, int, str or an array of shape ``[]``.
    """
    return {name: _plain(name, value) for name, value in scalars.items()}


def _plain(name: str, value: Any) -> float | int | str:
    original = value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        with contextlib.suppress(NotImplementedError):  # a typed key has no value
            value = value.item()
    if isinstance(value, (float, int, str)):
        return value
    raise TypeError(
        f"{name}={type(original).__name__}(...) is not a plain scalar: per-example "
        "values are private; reveal it explicitly with run.log_sensitive=True"
    )


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _line(record: Mapping[str, Any]) -> str:
    strict = {
        name: json.dumps(v) if isinstance(v, float) and not math.isfinite(v) else v
        for name, v in record.items()
    }
    return json.dumps(strict, allow_nan=False) + "\n"


def _record(line: str, path: Path, number: int) -> dict[str, Any]:
    with contextlib.suppress(json.JSONDecodeError):
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            return {
                name: _NOT_FINITE.get(value, value) if isinstance(value, str) else value
                for name, value in record.items()
            }
    raise ValueError(f"{path}, line {number} is not a record of metrics: {line[:60]!r}")


def _import(package: str, *, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        message = f"{package} is not installed: pip install 'dpjax[{extra}]'"
        raise ImportError(message) from error


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}" if near else f"use any of {', '.join(known)}"
    return f"unknown writer {name!r}: {hint} (metrics.jsonl is always written)"


def _short(value: float | int | str) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _is_score(name: str) -> bool:
    return name.partition("/")[0].endswith("test")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _live_line(total_steps: int, start: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    # In 80 columns there is room for step, epsilon, a score and the times.
    bar = BarColumn(bar_width=8)
    whole = Column(no_wrap=True, overflow="ellipsis")
    text = TextColumn("{task.description}", markup=False, table_column=whole)
    live = Progress(bar, text, console=Console(stderr=True), auto_refresh=False)
    live.add_task("", total=total_steps, completed=start)
    return live
