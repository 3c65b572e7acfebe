"""A record of every release of a run: the guard against reusing noise.

Two different sums released under the same noise differ by no noise at all: subtracting
them lays both bare (the weakness of "sticky" noise; Gadotti et al. 2019). Noise is a
function of the step, so a step that is replayed after a resume must release exactly what
it released before. The ledger holds a fingerprint of each *noised* release, which is
public by post-processing, and refuses a step that comes out differently.
"""

import contextlib
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import TextIO


class NoiseReuseError(RuntimeError):
    """The noise of a step was about to be used for a second, different sum."""


class Ledger:
    """An append-only file of ``step fingerprint`` lines.

    Record a release before anything that depends on it (metrics, checkpoints) is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            self._file = opened.enter_context(path.open("a"))
            _lock(self._file)
            self._seen = _read(path)
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
            self._seen[step] = fingerprint
            self._file.write(f"{step} {fingerprint}\n")
            self._file.flush()
        elif known != fingerprint:
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
        os.fsync(self._file.fileno())

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _lock(file: TextIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise NoiseReuseError(
            f"{file.name} is in use: another process is training in this workdir"
        ) from error


def _read(path: Path) -> dict[int, int]:
    if not path.exists():
        return {}
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        # Torn by a crash, before anything that depends on it was written.
        lines.pop()
        path.write_text("".join(lines))
    seen: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        parts = line.split()
        if len(parts) != 2 or not all(part.isdigit() for part in parts):
            raise NoiseReuseError(
                f"line {number} of {path} is damaged: {line.strip()!r}"
            )
        step, mark = map(int, parts)
        if seen.setdefault(step, mark) != mark:
            raise NoiseReuseError(f"line {number} of {path} contradicts an earlier one")
    return seen
