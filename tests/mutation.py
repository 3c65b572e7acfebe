"""Break the code on purpose, one line at a time, and see that a test notices.

``python -m tests.mutation [--only=TEXT] [--part=K/N]``

Every mutant of ``tests.mutants`` is a plausible bug. It is put into a copy of the
repository, and the tests that are named for it are run there; before, they have to pass
without it. One line is printed for each mutant. The exit status is 1 if a mutant survives,
if its text is not found exactly once, or if its tests fail without it. With ``--only``
those with TEXT in them are run, with ``--part`` every N-th, the K-th first, from 1 on.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
_LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", "results")
_SECONDS = 600
_FORKS = multiprocessing.get_context("forkserver")
# To import what the project needs takes longer than most tests: it is done once, by the
# process that those of all mutants are forked from.
_IMPORTED = "jax optax scipy.optimize scipy.signal scipy.stats dp_accounting.pld"
_IMPORTED += " dp_accounting.rdp sklearn.datasets hypothesis flax.linen grain"
_IMPORTED += " orbax.checkpoint.v1"


class Mutant(NamedTuple):
    """One plausible bug.

    Attributes:
        module: Where it is, as a dotted name.
        old: Text that is in the module exactly once.
        new: What stands in its place.
        tests: What must fail: arguments of pytest, below ``tests/``.
    """

    module: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        lines = zip(self.old.splitlines(), self.new.splitlines(), strict=False)
        old, new = next(
            ((a, b) for a, b in lines if a != b), (self.old, self.new or "nothing")
        )
        old, new = (" ".join(text.split())[:60] for text in (old, new))
        return f"{self.module}: {old} -> {new}"


class Outcome(NamedTuple):
    """What became of a mutant: whether it was caught, and in words."""

    caught: bool
    told: str


def run(mutant: Mutant, root: Path) -> Outcome:
    """Put ``mutant`` into the copy at ``root``, run its tests, and take it out again."""
    path = root.joinpath(*mutant.module.split(".")).with_suffix(".py")
    if not path.exists():
        return Outcome(caught=False, told="module not found")
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return Outcome(
            caught=False, told=f"old text found {text.count(mutant.old)} times"
        )
    try:
        path.write_text(text.replace(mutant.old, mutant.new))
        return outcome(*tested(mutant.tests.split(), root))
    finally:
        path.write_text(text)


def tested(tests: Sequence[str], root: Path) -> tuple[int | None, str]:
    """Run tests up to the first that fails; return status (None: too slow) and output."""
    with tempfile.NamedTemporaryFile("r") as told:
        process = _FORKS.Process(target=_pytest, args=(tests, root, told.name))
        process.start()
        process.join(_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            return None, ""
        return process.exitcode, told.read()


def _pytest(tests: Sequence[str], root: Path, told: str) -> None:
    """Run pytest at ``root``, in a process of its own; what it says goes to a file."""
    with open(told, "w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(root)
    sys.path[:] = [
        str(root),
        *(path for path in sys.path if path not in ("", str(ROOT))),
    ]
    # Compiled files are known by second and size, which a mutant may share.
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ.pop("PYTHONPATH", None)
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]  # Those of the copy are meant.
    import pytest

    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", ""]  # long ones, too
    # Plugins that were imported before have asserts of their own, and need no others.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    names = [f"tests/{name}" for name in tests]
    sys.exit(int(pytest.main([*options, *names])))


def outcome(status: int | None, output: str) -> Outcome:
    """Read what pytest says: a mutant is caught by a test that fails, and only so."""
    if status is None:
        return Outcome(caught=False, told=f"TOOK MORE THAN {_SECONDS} SECONDS")
    if status == 0:
        return Outcome(caught=False, told="SURVIVED")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    # Status 1: tests ran, and one failed. All others: pytest itself could not go on.
    if status == 1 and failed:
        return Outcome(caught=True, told=f"caught by {failed[1]}")
    return Outcome(caught=False, told=f"TESTS DID NOT RUN (status {status})")


def copied(folder: Path) -> Path:
    """Return a copy of the repository in ``folder``, without what is not of it."""
    copy = folder / "copy"
    shutil.copytree(ROOT, copy, ignore=_LEFT_OUT, symlinks=True)
    return copy


def main(arguments: Sequence[str] | None = None) -> int:
    """Run mutants; return the exit status."""
    from tests.mutants import MUTANTS

    parser = argparse.ArgumentParser(prog="python -m tests.mutation")
    parser.add_argument("--only", default="", help="those with this text in them")
    parser.add_argument(
        "--part", default="1/1", help="K/N: every N-th from the K-th on"
    )
    options = parser.parse_args(arguments)
    first, stride = map(int, options.part.split("/"))
    chosen = [m for m in MUTANTS if options.only in f"{m} {m.tests}"][
        first - 1 :: stride
    ]
    _FORKS.set_forkserver_preload(_IMPORTED.split())
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        root = copied(Path(folder))
        named = sorted({test for mutant in chosen for test in mutant.tests.split()})
        status, output = tested(named, root)
        if status != 0:
            print(
                f"without any mutant: {outcome(status, output).told}\n{output[-2000:]}"
            )
            return 1
        for mutant in chosen:
            begun = time.monotonic()
            caught, told = run(mutant, root)
            missed += not caught
            print(f"{mutant}: {told} ({time.monotonic() - begun:.0f} s)", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} mutants caught")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
