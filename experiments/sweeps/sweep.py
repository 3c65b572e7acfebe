"""Sweeps: a Python file that yields changes of one config, and the folder of its runs.

A sweep file defines ``config()``, the ``ConfigDict`` that its cells change; ``cells()``,
which yields a ``Cell`` for each run; and ``BEST``, "highest" or "lowest": which score is
the better one. Of a file with variants, both functions take its name. A folder holds one
sweep: ``sweep.json`` lists its cells, and each run has a folder of its own, named by a
hash of its resolved config, with ``result.json`` once it has ended. Does not import jax.
"""

import contextlib
import dataclasses
import inspect
import itertools
import json
import os
import runpy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dpjax.training.config import ConfigError, check, digest, nearest, place_of, told

Labels = Mapping[str, str | float | None]
BESTS = ("highest", "lowest")
Task = TypeVar("Task")
MANIFEST, RESULT = "sweep.json", "result.json"


class Cell(NamedTuple):
    """One run of a sweep.

    Attributes:
        labels: What tells the run from others in a table; runs with the same labels are
            repetitions, told apart by ``repetition`` or by ``run.seed``.
        overrides: ``{"group.key": value}``; a value replaces what stood there, a whole
            group if it is a dict. The path must exist in the config.
        repetition: Number of a run among those of one config.
    """

    labels: Labels
    overrides: Mapping[str, Any]
    repetition: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A cell with its resolved config.

    Attributes:
        index: Position in the sweep.
        name: Of its folder, a hash of the config and the repetition.
        labels: See ``Cell``.
        repetition: See ``Cell``.
        config: Plain dicts, checked.
    """

    index: int
    name: str
    labels: Labels
    repetition: int
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep file, read and checked.

    Attributes:
        source: ``FILE[:VARIANT]``, as it was given.
        best: "highest" or "lowest".
        runs: In order.
    """

    source: str
    best: str
    runs: tuple[Run, ...]


def grid(**axes: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield every combination of the values of the axes, the last one fastest.

    >>> list(grid(clip=(1, 2), lr=(0.1,)))
    [{'clip': 1, 'lr': 0.1}, {'clip': 2, 'lr': 0.1}]
    """
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def zipped(**axes: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield the first value of each axis, then the second, and so on.

    >>> list(zipped(clip=(1, 2), lr=(0.2, 0.1)))
    [{'clip': 1, 'lr': 0.2}, {'clip': 2, 'lr': 0.1}]

    Raises:
        ValueError: The axes have different lengths.
    """
    for values in zip(*axes.values(), strict=True):
        yield dict(zip(axes, values, strict=True))


def repeated(cells: Iterable[Cell], times: int) -> Iterator[Cell]:
    """Yield each cell ``times`` times; each run draws seeds of its own, which are secret.

    They are in its checkpoints and nowhere else: these runs are private, each as its card
    says, and cannot be had again bit for bit.
    """
    for cell in cells:
        overrides = {**cell.overrides, "run.seed": None}
        for number in range(times):
            yield cell._replace(overrides=overrides, repetition=number)


def seeded(cells: Iterable[Cell], seeds: Sequence[int]) -> Iterator[Cell]:
    """Yield each cell once for every seed, which becomes ``run.seed``.

    Written seeds protect nobody: this is for data that are public in truth. See
    ``repeated``.
    """
    for cell in cells:
        for seed in seeds:
            yield cell._replace(overrides={**cell.overrides, "run.seed": seed})


def task_of(tasks: Mapping[str, Task], variant: str) -> Task:
    """Return the task of ``NAME`` or ``NAME_tuning``.

    Raises:
        ValueError: There is none.
    """
    name = variant.removesuffix("_tuning")
    if name not in tasks:
        known = ", ".join(tasks)
        raise ValueError(f"variant={variant!r} is unknown; {known}, or _tuning")
    return tasks[name]


def load(source: str) -> Sweep:
    """Read ``FILE[:VARIANT]`` and check each config of it.

    Raises:
        ConfigError: Something is wrong, told with the cell it is in.
    """
    path, colon, variant = source.partition(":")
    if not Path(path).is_file():
        raise ConfigError(
            f"{path} is not a file; name a sweep such as those of sweeps/"
        )
    with _of_the_file(source):
        module = runpy.run_path(path)
    missing = [name for name in ("config", "cells", "BEST") if name not in module]
    if missing:
        raise ConfigError(
            f"{path} does not define {missing[0]}; see experiments/sweeps/sweep.py"
        )
    if module["BEST"] not in BESTS:
        raise ConfigError(f"{path}: BEST={module['BEST']!r}; {nearest('', BESTS)}")
    named = bool(inspect.signature(module["cells"]).parameters)
    if named != bool(colon):
        fault = (
            "needs a variant, FILE:VARIANT" if named else f"has no variant {variant}"
        )
        raise ConfigError(f"{path} {fault}")
    arguments = [variant] if named else []
    with _of_the_file(source):
        base = module["config"](*arguments).to_dict()
        cells = list(module["cells"](*arguments))
        json.dumps([base, cells])  # they are written down
    if strange := next((c for c in cells if not isinstance(c, Cell)), None):
        raise ConfigError(f"{source}: cells() yields {strange!r}; it must yield Cells")
    if not cells:
        raise ConfigError(f"{source} yields no cells")
    runs = tuple(_resolved(base, cell, index) for index, cell in enumerate(cells))
    _check_distinct(runs)
    return Sweep(source=source, best=module["BEST"], runs=runs)


@contextlib.contextmanager
def _of_the_file(source: str) -> Iterator[None]:
    """Tell of an error of a sweep file, which is the user's code, in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source}: {error}{place_of(error)}") from error
    except Exception as error:
        raise ConfigError(f"{source}: {told(error)}") from error


def changed(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``config`` with the values of ``overrides`` in their places.

    Raises:
        ConfigError: A path does not exist.
    """
    result = json.loads(json.dumps(config))
    for path, value in overrides.items():
        *groups, last = path.split(".")
        node = result
        for group in groups:
            node = node.get(group) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            hint = nearest(last, node) if isinstance(node, dict) else ""
            raise ConfigError(
                f"config.{path} is unknown (to add keys, override the group); {hint}"
            )
        node[last] = json.loads(json.dumps(value))
    return result


def chosen(path: Path) -> list[dict[str, Any]]:
    """Return the labels that ``experiments.gather --choose`` kept in a file.

    Raises:
        ConfigError: There is no such file.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is not there: run the tuning, then gather --chosen")
    return [choice["labels"] for choice in read_json(path)["choices"]]


def begin(sweep: Sweep, directory: Path, *, partly: bool) -> None:
    """Write the manifest of ``sweep`` into its folder.

    Args:
        sweep: What will run.
        directory: Made if it is absent.
        partly: Only some cells will run: a manifest of other cells is then refused.

    Raises:
        ConfigError: The folder lists other cells, or is another sweep's.
    """
    manifest = {
        "sweep": sweep.source,
        "best": sweep.best,
        "cells": [
            {
                "run": r.name,
                "labels": dict(r.labels),
                "repetition": r.repetition,
                "seed": r.config["run"]["seed"],
            }
            for r in sweep.runs
        ],
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / MANIFEST
    before: dict[str, Any] = read_json(path) if path.exists() else manifest
    shared = {c["run"] for c in before["cells"]} & {r.name for r in sweep.runs}
    if before["sweep"] != sweep.source and not shared:
        raise ConfigError(
            f"{path} is of the sweep {before['sweep']}, and a folder holds one: take another "
            f"folder for {sweep.source}"
        )
    if partly and before["cells"] != manifest["cells"]:
        raise ConfigError(
            f"{path} lists other cells than {sweep.source} does now; run it without --only"
        )
    write_json(path, manifest)


def is_finished(directory: Path, name: str) -> bool:
    """Whether the run of this name has a result of a whole training."""
    path = directory / name / RESULT
    return path.exists() and read_json(path)["status"] == "finished"


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds: the facts of a run or of a sweep.

    Raises:
        ConfigError: It is damaged, or of another kind.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"{path} holds a {type(found).__name__}: it is of something else"
        )
    return found


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of the sweep in a folder.

    Raises:
        ConfigError: It is damaged, or of another kind.
    """
    manifest = read_json(directory / MANIFEST)
    if missing := [k for k in ("sweep", "best", "cells") if k not in manifest]:
        raise ConfigError(
            f"{directory / MANIFEST} has no {missing[0]!r}: it lists no sweep"
        )
    return manifest


def write_json(path: Path, value: Any) -> None:
    """Write a file that is either whole or absent, whoever else writes it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    unfinished.replace(path)


def _resolved(base: Mapping[str, Any], cell: Cell, index: int) -> Run:
    try:
        config = changed(base, cell.overrides)
        check(config)
    except ConfigError as error:
        raise ConfigError(f"cell {index} {dict(cell.labels)}: {error}") from error
    # The first keeps the name that its config alone would have.
    named = {**config, "repetition": cell.repetition} if cell.repetition else config
    return Run(
        index=index,
        name=digest(named),
        labels=cell.labels,
        repetition=cell.repetition,
        config=config,
    )


def _check_distinct(runs: Sequence[Run]) -> None:
    seen: dict[str, Run] = {}
    for run in runs:
        twin = seen.setdefault(run.name, run)
        if twin is not run:
            raise ConfigError(
                f"cells {twin.index} and {run.index} {dict(run.labels)} have one config; "
                "repeat it by sweep.repeated (or by sweep.seeded, with written seeds)"
            )
