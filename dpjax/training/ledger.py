"""A record of every release of a run: the guard against reusing noise.

Two different sums released under the same noise differ by no noise at all: subtracting
them lays both bare (the weakness of "sticky" noise; Gadotti et al. 2019). Noise is a
function of the step, so a step that is replayed after a resume must release exactly what
it released before. The ledger holds a fingerprint of each *noised* release, which is
public by post-processing, and refuses a step that comes out differently.

On another layout (mesh, number of processes, kind of device) sums are rounded otherwise, and
what rounding depends on is the data. So steps are replayed on the layout that released them
only; between the last release and the next one, it may change.
"""

import contextlib
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TextIO


class NoiseReuseError(RuntimeError):
    """The noise of a step was about to be used for a second, different sum."""


class Release(NamedTuple):
    """What is kept of one: its uint32 fingerprint, and the layout that computed it."""

    fingerprint: int
    layout: str


class Ledger:
    """An append-only file of ``step fingerprint layout`` lines.

    Record a release before anything that depends on it (metrics, checkpoints) is written.

    Args:
        path: Created if absent.
        layout: What this run computes on, without spaces.
        writes: Whether this process is the one that writes and locks the file. The others
            of the run open it later, and check what it checks.
    """

    def __init__(self, path: Path, *, layout: str, writes: bool = True) -> None:
        self._path, self._layout = path, layout
        self._file: TextIO | None = None
        if not writes:
            self._seen = _parse(path, path.read_text())
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            self._file = opened.enter_context(path.open("a"))
            _lock(self._file)
            text = path.read_text()
            # Torn by a crash, before anything that depends on it was written.
            os.truncate(path, len(_whole_lines(text).encode()))
            self._seen = _parse(path, text)
            opened.pop_all()  # Opened for good: __exit__ closes it.

    @property
    def releases(self) -> int:
        """How many steps were released, replayed ones counted once."""
        return len(self._seen)

    def record(self, step: int, fingerprint: int) -> None:
        """Note what ``step`` released, in its uint32 fingerprint.

        Raises:
            NoiseReuseError: The step released something else before.
        """
        known = self._seen.get(step)
        if known is None:
            self._seen[step] = Release(fingerprint, self._layout)
            if self._file is not None:
                self._file.write(f"{step} {fingerprint} {self._layout}\n")
                self._file.flush()
        elif known.fingerprint != fingerprint:
            raise NoiseReuseError(
                f"step {step} was released before with another sum under the same noise "
                f"(see {self._path}); the difference of both would not be private. Data, "
                "config, code or hardware changed since: start a new run in a new workdir"
            )

    def check_complete(self, steps: int) -> None:
        """Raise NoiseReuseError unless the first ``steps`` releases are recorded."""
        missing = [number for number in range(steps) if number not in self._seen]
        if missing:
            raise NoiseReuseError(
                f"{self._path} does not record the release of step {missing[0]}: it was "
                "changed or lost; bring it back, or start a new run in a new workdir"
            )

    def check_layout(self, start: int) -> None:
        """Raise NoiseReuseError if steps from ``start`` on were released elsewhere."""
        for step in range(start, max(self._seen, default=-1) + 1):
            before = self._seen[step].layout if step in self._seen else self._layout
            if before != self._layout:
                raise NoiseReuseError(
                    f"step {step} was released on {before}, after the last checkpoint, and "
                    f"would be replayed on {self._layout}, which rounds sums otherwise: "
                    "the difference is not private. Go on where it ran (a run that was "
                    "stopped by a signal may go on anywhere), or start a new run in a new "
                    "workdir"
                )

    def check_empty(self) -> None:
        """Raise NoiseReuseError if releases were made by a run whose state is lost."""
        if self._seen:
            raise NoiseReuseError(
                f"{self._path} records {len(self._seen)} releases, but there is no "
                "checkpoint to go on from: starting again would release more than is "
                "accounted; use a new workdir"
            )

    def sync(self) -> None:
        """Make the record outlive a loss of power."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def _lock(file: TextIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise NoiseReuseError(
            f"{file.name} is in use: another process is training in this workdir"
        ) from error


def _whole_lines(text: str) -> str:
    return text[: text.rfind("\n") + 1]


def _parse(path: Path, text: str) -> dict[int, Release]:
    seen: dict[int, Release] = {}
    for number, line in enumerate(_whole_lines(text).splitlines(), start=1):
        parts = line.split()
        if len(parts) != 3 or not all(part.isdigit() for part in parts[:2]):
            raise NoiseReuseError(
                f"line {number} of {path} is damaged: {line.strip()!r}"
            )
        step, mark = int(parts[0]), Release(int(parts[1]), parts[2])
        if seen.setdefault(step, mark) != mark:
            raise NoiseReuseError(f"line {number} of {path} contradicts an earlier one")
    return seen
