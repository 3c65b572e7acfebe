"""End to end on a real Slurm: many processes, sweeps, and going on after a preemption."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from dpjax.train import train
from launch import slurm
from launch.job import Job
from tests.launch import cluster
from tests.runs import ROOT, assert_same_export, metrics, tiny

pytestmark = pytest.mark.slurm

ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests"),
}
TRAINING = {"mechanism.steps": 40, "run.log_every": 1, "run.checkpoint_every": 1000}

# Run 2 fails; runs 1 and 5 are told to stop, and have saved, the first time. The number of
# the job of run 5, the last one, is that of the whole array.
SWEEP = """
echo "start $1"
case "$1,${SLURM_RESTART_COUNT:-0}" in 2,*) exit 3 ;; 1,0 | 5,0) exit 75 ;; esac
echo done > "result-$1"
"""
GATHER = "for i in 0 1 2 5; do [[ -e result-$i ]] || echo failed: $i; done"

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
        preempt(started)
        yield started


def submit_all(new_folder):
    def submit(name, *command, hosts=1):
        folder = new_folder(name)
        job = Job(
            name=name,
            command=command,
            hosts=hosts,
            directory=str(folder),
            environment=ENVIRONMENT,
        )
        return Submitted(slurm.submit(job, slurm.Options()), folder)

    return {
        "train": submit("train", *training_command()),
        "stopped": submit("stopped", "bash", "-c", STOPPED, hosts=2),
        "cancelled": submit("cancelled", "bash", "-c", STOPPED, hosts=2),
        "peers": submit("peers", sys.executable, "-m", "tests.launch.peers", hosts=2),
        **submit_sweep(new_folder("sweep")),
    }


def training_command():
    config = ROOT / "tests" / "tiny_config.py"
    flags = [f"--config.{key}={value}" for key, value in TRAINING.items()]
    module = (sys.executable, "-m", "experiments.train")
    return (*module, f"--config={config}", *flags, "--workdir=run")


def submit_sweep(folder):
    run = Job(
        name="sweep",
        command=("bash", "-c", SWEEP, "run", "{index}"),
        directory=str(folder),
    )
    gather = Job(name="gather", command=("bash", "-c", GATHER), directory=str(folder))
    array = slurm.submit_array(run, slurm.Options(), [5, 0, 2, 1], at_once=3)
    after = slurm.submit(gather, slurm.Options(after=array))
    return {"sweep": Submitted(array, folder), "gather": Submitted(after, folder)}


def preempt(started):
    """Send running jobs what Slurm sends to make room, before a time limit, at the end."""
    training = started["train"]
    cluster.until(
        lambda: last_step(training.folder / "run") >= 3, training.describe, seconds=120
    )
    subprocess.run(["scontrol", "requeue", training.id], check=True)
    for name, words in (
        ("stopped", ["scancel", "--signal=TERM"]),
        ("cancelled", ["scancel"]),
    ):
        job = started[name]
        cluster.until(job.ready, job.describe)
        subprocess.run([*words, job.id], check=True)


def last_step(workdir):
    try:
        return metrics(workdir)[-1]["step"]
    except (OSError, ValueError, IndexError):
        return 0


def test_processes_on_two_nodes_find_each_other(jobs):
    peers = jobs["peers"]
    assert peers.ended() == {"": "COMPLETED"}, peers.log
    for index in range(2):
        assert f"process {index} of 2, 1 devices: 3" in peers.log


def test_one_failing_run_of_a_sweep_stops_no_other_and_is_listed(jobs):
    sweep, gather = jobs["sweep"], jobs["gather"]
    assert gather.ended() == {"": "COMPLETED"}
    done = dict.fromkeys(("0", "1", "5"), "COMPLETED")
    assert sweep.ended() == done | {"2": "FAILED"}
    log = gather.folder / f"slurm-gather-{gather.id}.out"
    assert log.read_text() == "failed: 2\n"


def test_of_a_sweep_only_the_runs_that_were_preempted_run_again(jobs):
    jobs["gather"].ended()
    lines = jobs["sweep"].log.splitlines()
    starts = sorted(line for line in lines if line.startswith("start"))
    assert starts == [f"start {index}" for index in (0, 1, 1, 2, 5, 5)]


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


def test_a_preempted_run_ends_bitwise_like_an_undisturbed_one(jobs, tmp_path):
    train(tiny(**TRAINING), tmp_path)
    training = jobs["train"]
    assert training.ended() == {"": "COMPLETED"}, training.log
    assert training.log.count("saving after this step") == 1
    assert_same_export(training.folder / "run", tmp_path)
