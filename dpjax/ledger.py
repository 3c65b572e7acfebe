"""A record of every release of a run: the guard against reusing noise.

Two different sums released under the same noise differ by no noise at all: subtracting
them lays both bare (the weakness of "sticky" noise; Gadotti et al. 2019). Noise is a
function of the step, so a step that is replayed after a resume must release exactly what
it released before. The ledger holds a fingerprint of each *noised* release, which is
public by post-processing, and refuses a step that comes out differently.
"""

from pathlib import Path
from types import TracebackType


class NoiseReuseError(RuntimeError):
    """The noise of a step was about to be used for a second, different sum."""


class Ledger:
    """An append-only file of ``step fingerprint`` lines.

    Record a release before anything that depends on it (metrics, checkpoints) is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = _read(path)
        self._file = path.open("a")

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

    def check_empty(self) -> None:
        """Raise NoiseReuseError if releases were made by a run whose state is lost."""
        if self._seen:
            raise NoiseReuseError(
                f"{self._path} records {len(self._seen)} releases, but there is no "
                "checkpoint to go on from: starting again would release more than is "
                "accounted; use a new workdir"
            )

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _read(path: Path) -> dict[int, int]:
    if not path.exists():
        return {}
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        # Torn by a crash, before anything that depends on it was written.
        lines.pop()
        path.write_text("".join(lines))
    return {int(step): int(mark) for step, mark in map(str.split, lines)}
