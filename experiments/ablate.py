"""Run a sweep: each cell in a folder of its own, what is finished only once.

    python -m experiments.ablate SWEEP --out=DIR [--workers=N] [--only=I,J,...]
        [--launcher=local|slurm] [--accelerator=cpu|gpu:MODEL] [--minutes=N] [--sbatch=...]

SWEEP          FILE[:VARIANT], a Python file; see experiments/sweeps/sweep.py and sweeps/
--out=DIR      receives sweep.json, and a folder for each run with result.json
--workers=N    processes at a time; this one alone if not given
--only=I,J     only these cells, in this process: what a task of a job array calls
--launcher=slurm submit what is left as an array, a cell a task, at most --workers at a time;
               local, here, if not given. For it are --accelerator and --minutes of each task,
               and --sbatch="...", further options of sbatch

The same command again runs what failed or is missing; a run that was cut short goes on
from its checkpoint. `python -m experiments.gather DIR` shows what there is. One process for
many cells shares the cost of importing and compiling.

Exit status: 0 all are finished, 1 some failed, 2 wrong arguments or sweep, 75 interrupted
by a signal (run the same command again to go on).
"""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from dpjax.parallel.allocator import keep_freed_memory
from dpjax.training.config import ConfigError
from experiments.shared import options, timing
from experiments.sweeps import sweep
from experiments.sweeps.sweep import Run, Sweep

_SLURM = ("accelerator", "minutes", "sbatch")
_OPTIONS = ("out", "workers", "only", "launcher", *_SLURM)


class Plan(NamedTuple):
    """What was asked for, checked."""

    sweep: Sweep
    out: Path
    workers: int | None
    only: tuple[int, ...] | None
    slurm: dict[str, str] | None


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    return options.command(argv, __doc__, _begun, lambda plan: _run(plan, argv))


def _begun(argv: list[str]) -> Plan:
    plan = _plan(argv)
    sweep.begin(plan.sweep, plan.out, partly=plan.only is not None)
    return plan


def _run(plan: Plan, argv: list[str]) -> int:
    chosen = range(len(plan.sweep.runs)) if plan.only is None else plan.only
    pending = [
        plan.sweep.runs[i]
        for i in chosen
        if not sweep.is_finished(plan.out, plan.sweep.runs[i].name)
    ]
    print(f"{len(pending)} of {len(chosen)} cells to run")
    if plan.slurm is not None and pending:
        return _submit(plan, pending)
    workers = min(plan.workers or 1, len(pending))
    if workers > 1:
        return _share(plan, pending, workers)
    return _run_all(pending, plan.out, argv)


def _run_all(runs: Sequence[Run], out: Path, argv: list[str]) -> int:
    """Run the cells one after the other in this process."""
    if not runs:
        return 0
    _cache_programs()
    keep_freed_memory()
    import jax

    from dpjax.training.about import PACKAGES, device
    from dpjax.training.train import Interrupted

    facts = timing.provenance(
        module="experiments.ablate",
        argv=argv,
        packages=PACKAGES,
        device=device(),
    )
    failed = 0
    for run in runs:
        try:
            result = _result(run, out / run.name)
        except Interrupted as interrupted:
            print(f"interrupted in cell {run.index}: {interrupted}")
            return os.EX_TEMPFAIL
        sweep.write_json(out / run.name / sweep.RESULT, {**result, **facts})
        failed += result["status"] == "failed"
        jax.clear_caches()  # the programs of a run are of no use to the next one
        print(f"cell {run.index} {dict(run.labels)}: {result['status']}", flush=True)
    return 1 if failed else 0


def _result(run: Run, folder: Path) -> dict[str, Any]:
    """Train; return what is told of the run, whatever becomes of it."""
    from dpjax.training import report
    from dpjax.training.metrics import read_jsonl
    from dpjax.training.train import Interrupted, train

    folder.mkdir(exist_ok=True)
    metric, start = report.metric_name(run.config), time.perf_counter()
    result: dict[str, Any] = {
        "status": "finished",
        "error": None,
        "labels": dict(run.labels),
        "repetition": run.repetition,
        "seed": run.config["run"]["seed"],
        "metric": metric,
        "score": None,
        "epsilon": None,
    }
    try:
        train(run.config, folder)
        card = sweep.read_json(folder / "privacy_card.json")
        result |= {name: card[name] for name in ("epsilon", "delta", "proven", "flags")}
        result["score"] = read_jsonl(folder / "metrics.jsonl")[-1][metric]
    except Interrupted:
        raise
    except Exception as error:
        # One cell that diverges, or needs too much memory, must not stop the others.
        logging.exception("cell %d failed", run.index)
        result |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    return {**result, "seconds": time.perf_counter() - start, "config": run.config}


def _submit(plan: Plan, pending: Sequence[Run]) -> int:
    """Submit the cells as an array of jobs."""
    from launch import slurm
    from launch.job import Job, LaunchError

    assert plan.slurm is not None
    minutes = plan.slurm.get("minutes")
    stem = Path(plan.sweep.source.partition(":")[0]).stem
    try:
        job = Job(
            name=re.sub("[^a-z0-9]+", "-", stem.lower()).strip("-")[:40],
            command=(*_command(plan), f"--only={slurm.INDEX}"),
            accelerator=plan.slurm.get("accelerator", "cpu"),
            minutes=None if minutes is None else options.positive("minutes", minutes),
            directory=str(Path.cwd()),
        )
        array = slurm.submit_array(
            job,
            slurm.Options(sbatch=plan.slurm.get("sbatch", "")),
            [run.index for run in pending],
            at_once=plan.workers,
        )
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"job array {array}; see python -m experiments.gather {plan.out}")
    return 0


def _command(plan: Plan) -> list[str]:
    command = [sys.executable, "-m", "experiments.ablate", plan.sweep.source]
    return [*command, f"--out={plan.out}"]


def _share(plan: Plan, pending: Sequence[Run], workers: int) -> int:
    """Run the cells in processes of their own, each with its share."""
    processes = []
    for i in range(workers):
        share = ",".join(str(run.index) for run in pending[i::workers])
        processes.append(subprocess.Popen([*_command(plan), f"--only={share}"]))

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        for process in processes:
            process.terminate()  # nothing to those that have ended

    old = signal.signal(signal.SIGTERM, stop)
    try:
        codes = [process.wait() for process in processes]
    except KeyboardInterrupt:  # which the terminal sent to all of them
        codes = [process.wait() for process in processes]
    finally:
        signal.signal(signal.SIGTERM, old)
    return max(code if code >= 0 else 1 for code in codes)


def _cache_programs() -> None:
    """Keep compiled programs, small ones too: runs that differ in seeds share them."""
    options.keep_programs()
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


def _plan(argv: list[str]) -> Plan:
    sources, given = options.split(argv, _OPTIONS)
    if len(sources) != 1:
        raise ConfigError("name one sweep, FILE[:VARIANT]; see --help")
    if "out" not in given:
        raise ConfigError("--out=DIR is missing; see --help")
    workers = None
    if "workers" in given:
        workers = options.positive("workers", given["workers"])
    slurm = _slurm_options(given)
    loaded = sweep.load(sources[0])
    only = None
    if "only" in given:
        only = tuple(
            _index(text, len(loaded.runs)) for text in given["only"].split(",")
        )
    return Plan(loaded, Path(given["out"]), workers, only, slurm)


def _slurm_options(given: dict[str, str]) -> dict[str, str] | None:
    launcher = given.get("launcher", "local")
    options.choices("launcher", launcher, ("local", "slurm"))
    found = {name: given[name] for name in _SLURM if name in given}
    if launcher == "slurm":
        return found
    if found:
        raise ConfigError(f"--{next(iter(found))} is for --launcher=slurm")
    return None


def _index(text: str, count: int) -> int:
    if not text.isdecimal() or int(text) >= count:
        raise ConfigError(f"--only={text} must be a cell, 0 to {count - 1}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
