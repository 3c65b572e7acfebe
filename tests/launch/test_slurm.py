"""End to end on a real Slurm: many processes, sweeps, and going on after a preemption."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from experiments import gather
from experiments.sweeps import summary, sweep
from launch import slurm
from launch.job import Job
from tests.launch import cluster
from tests.runs import ROOT, assert_same_export, sweep_file

pytestmark = [pytest.mark.slurm, pytest.mark.long]

ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "XLA_FLAGS": os.environ["XLA_FLAGS"],
}
TRAIN = (sys.executable, "-m", "experiments.train", "--workdir=run")
GATHER = (sys.executable, "-m", "experiments.gather")
# What tests/parallel/test_processes.py trains, for longer.
LONG = {
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "model.features": "()",
    "mechanism.steps": 150,
    "run.log_every": 1000,
    "run.eval_every": 1000,
    "run.checkpoint_every": 1000,
}

# Stand-ins for a trainer, where what counts is the order of things: tasks 1 and 3 are told
# to stop, and have saved, the first time. The number of the job of task 3, the last one, is
# that of the whole array.
ARRAY = """
echo "start $1"
case "$1,${SLURM_RESTART_COUNT:-0}" in 1,0 | 3,0) exit 75 ;; esac
"""

# Runs until it is told to stop; the second process takes longer to save.
STOPPED = """
echo "start $SLURM_PROCID"
[[ -z "${SLURM_RESTART_COUNT:-}" ]] || exit 0
trap 'sleep "$SLURM_PROCID"; echo "saved $SLURM_PROCID"; exit 75' TERM
: > "ready-$SLURM_PROCID"
while true; do sleep 0.1; done
"""


class Submitted(NamedTuple):
    """A job, and the folder it runs in."""

    id: str
    folder: Path

    @property
    def log(self):
        return "\n".join(p.read_text() for p in sorted(self.folder.glob("slurm-*.out")))

    def describe(self):
        return f"{cluster.states(self.id)}\n{self.log}"

    def ready(self):
        """Whether both processes of STOPPED run."""
        return all((self.folder / f"ready-{index}").exists() for index in range(2))

    @property
    def ledger(self):
        """A line for each step that a training has released."""
        path = self.folder / "run" / "ledger.txt"
        return path.read_text().splitlines() if path.exists() else []

    def ended(self):
        """Wait for the end; return the states of the job, or of its tasks by index."""
        states = cluster.wait_for(self.id)
        return {name.partition("_")[2]: state for name, state in states.items()}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Bring up Slurm and start all jobs together: they mostly wait."""
    if missing := cluster.missing():
        pytest.skip(f"end to end on Slurm: no {', '.join(missing)} (see .ci/run)")
    with cluster.slurm(tmp_path_factory.mktemp("slurm")):
        started = submit_all(tmp_path_factory.mktemp)
        interrupt(started)
        yield started


def submit_all(new_folder):
    training = (*TRAIN, f"--config={ROOT / 'tests' / 'tiny_config.py'}")
    training += tuple(f"--config.{key}={value}" for key, value in LONG.items())
    stopped = ("bash", "-c", STOPPED)
    return {
        name: submit(new_folder(name), name, *command, hosts=2, devices_per_process=2)
        for name, command in {
            "preempted": training,
            "undisturbed": training,
            "stopped": stopped,
            "cancelled": stopped,
        }.items()
    } | {
        "array": submit(
            new_folder("array"),
            "array",
            *("bash", "-c", ARRAY, "run", "{index}"),
            options=slurm.Options(array=slurm.ranges([0, 1, 3])),
        ),
        **submit_sweep(new_folder("sweep")),
    }


def submit(folder, name, *command, options=None, **changes):
    fields = {"directory": str(folder), "environment": ENVIRONMENT}
    job = Job(name=name, command=command, **fields, **changes)
    return Submitted(slurm.submit(job, options or slurm.Options()), folder)


def submit_sweep(folder):
    """Of a sweep, run 0 is well, run 1 diverges, run 2 is cancelled before it starts."""
    source = sweep_file(folder, rates=(1.0, 1e38, 2.0), seeds=(1,))
    ablate = (sys.executable, "-m", "experiments.ablate", source, "--out=runs")
    said = subprocess.run(
        [*ablate, "--launcher=slurm", "--workers=2"],
        cwd=folder,
        env=os.environ | ENVIRONMENT | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    array = array_of(said)
    subprocess.run(["scancel", f"{array}_2"], check=True)
    again = (*GATHER, "runs", "--resubmit", "--launcher=slurm")
    after = slurm.Options(after=array)
    return {
        "sweep": Submitted(array, folder),
        "gather": submit(folder, "gather", *again, options=after),
    }


def array_of(said):
    """The number of the array that experiments.ablate has submitted."""
    return re.search(r"^job array (\d+);", said, re.MULTILINE)[1]


def interrupt(started):
    """Send running jobs what Slurm sends to make room, before a time limit, at the end."""
    for name, ready, words in (
        ("stopped", Submitted.ready, ["scancel", "--signal=TERM"]),
        ("cancelled", Submitted.ready, ["scancel"]),
        ("preempted", lambda job: len(job.ledger) >= 3, ["scontrol", "requeue"]),
    ):
        job = started[name]
        cluster.until(lambda: ready(job), job.describe, seconds=120)  # noqa: B023
        subprocess.run([*words, job.id], check=True)


def test_of_an_array_only_the_tasks_that_were_preempted_run_again(jobs):
    assert set(jobs["array"].ended().values()) == {"COMPLETED"}
    starts = sorted(li for li in jobs["array"].log.splitlines() if "start" in li)
    assert starts == [f"start {index}" for index in (0, 1, 1, 3, 3)]


def test_every_process_may_finish_saving_before_the_job_runs_again(jobs):
    stopped = jobs["stopped"]
    assert stopped.ended() == {"": "COMPLETED"}, stopped.log
    for index in range(2):
        assert stopped.log.count(f"saved {index}") == 1
        assert stopped.log.count(f"start {index}") == 2


def test_a_cancelled_job_does_not_run_again(jobs):
    cancelled = jobs["cancelled"]
    assert cancelled.ended() == {"": "CANCELLED"}, cancelled.log
    assert cancelled.log.count("start 0") == 1


def test_a_sweep_is_gathered_and_only_what_failed_or_is_missing_runs_again(
    jobs, capsys
):
    first, gathering = jobs["sweep"], jobs["gather"]
    assert first.ended() == {"0": "COMPLETED", "1": "FAILED"}, first.log
    assert gathering.ended() == {"": "FAILED"}  # since not all runs are finished
    said = (first.folder / f"slurm-gather-{gathering.id}.out").read_text()
    assert "2 of 3 cells to run" in said, said
    assert "cell 1 failed: FloatingPointError" in said
    assert "cell 2 missing" in said
    again = Submitted(array_of(said), first.folder)
    assert again.ended() == {"1": "FAILED", "2": "COMPLETED"}, again.log
    out = first.folder / "runs"
    assert gather.main([str(out)]) == 1
    said = capsys.readouterr().out
    assert "cell 1 failed: FloatingPointError" in said
    assert "cell 2" not in said
    results = summary.results(sweep.read_json(out / sweep.MANIFEST), out)
    assert [result["status"] for result in results] == [
        "finished",
        "failed",
        "finished",
    ]
    assert all(result["epsilon"] > 0 and result["score"] > 0 for result in results[::2])


def test_a_preempted_run_of_two_nodes_ends_bitwise_like_an_undisturbed_one(jobs):
    preempted, undisturbed = jobs["preempted"], jobs["undisturbed"]
    for job in (preempted, undisturbed):
        assert job.ended() == {"": "COMPLETED"}, job.log
    saved = re.findall(r"interrupted: saved step (\d+) of 150", preempted.log)
    assert len(saved) == 2
    assert len(set(saved)) == 1
    assert "interrupted" not in undisturbed.log
    assert_same_export(preempted.folder / "run", undisturbed.folder / "run")
    # With a fingerprint of each release, and the mesh, processes and device it ran on.
    assert preempted.ledger == undisturbed.ledger
    assert preempted.ledger[-1].endswith(" 2x2/2/cpu")
