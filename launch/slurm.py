"""Slurm: an sbatch script, as a job or as an array over the runs of a sweep."""

import dataclasses
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from launch.job import GRACE_SECONDS, SAVED, Call, Job, LaunchError, exports

INDEX = "{index}"
"""Where the command of an array wants its index."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How Slurm runs a job.

    Attributes:
        partition: Its partition, None for the default one.
        array: Run the command once for each of these indices ("0-3,7", "0-99%8" for at
            most 8 at once), in place of ``{index}``.
        after: Start when this job has ended, well or not.
        sbatch: Further options of sbatch, as in "--account=lab --mem=64G".
    """

    partition: str | None = None
    array: str | None = None
    after: str | None = None
    sbatch: str = ""


def submit(job: Job, options: Options) -> str:
    """Submit ``job``; return its id.

    Raises:
        LaunchError: The job does not fit, or sbatch is missing or refused it.
    """
    # "ID" or "ID;CLUSTER".
    return render(job, options).run(output="returned").strip().partition(";")[0]


def submit_array(
    job: Job, options: Options, indices: Iterable[int], *, at_once: int | None = None
) -> str:
    """Submit an array that runs ``job`` with each of ``indices`` in place of ``{index}``.

    Runs are independent: one that fails stops no other. To run something after all of
    them, submit it with ``Options(after=...)``.

    Args:
        job: Its command has ``{index}`` in it.
        options: Partition and so on.
        indices: Not negative, no two the same.
        at_once: How many may run at a time; None for as many as fit.

    Returns:
        The id of the array.

    Raises:
        LaunchError: The job does not fit, or sbatch is missing or refused it.
    """
    array = ranges(indices) + (f"%{at_once}" if at_once else "")
    return submit(job, dataclasses.replace(options, array=array))


def ranges(indices: Iterable[int]) -> str:
    """Return indices as Slurm writes them.

    >>> ranges([3, 0, 1, 2, 7])
    '0-3,7'
    """
    ordered = sorted(indices)
    if not ordered or ordered[0] < 0 or len(set(ordered)) < len(ordered):
        raise LaunchError(f"indices={ordered} must be some numbers >= 0, all different")
    starts = [i for i in ordered if i - 1 not in ordered]
    ends = [i for i in ordered if i + 1 not in ordered]
    pairs = zip(starts, ends, strict=True)
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


def render(job: Job, options: Options) -> Call:
    """Return the call of sbatch.

    Raises:
        LaunchError: The job does not fit.
    """
    _check(job, options)
    # Slurm tells the processes of each other; experiments.train asks it when told to.
    flags = ("--distributed=auto",) if job.processes > 1 else ()
    text = "".join(
        (
            "#!/usr/bin/env bash\n",
            *(f"#SBATCH {line}\n" for line in _directives(job, options)),
            "set -uo pipefail\n",
            exports(job.variables | _visible_devices(job)),
            _BODY.format(command=_words((*job.command, *flags)), saved=SAVED),
        )
    )
    return Call(f"{job.name}.sbatch", text, ("sbatch", "--parsable"), tool="sbatch")


# A process that exits with 75 has saved its state because it was told to stop. srun must
# not count that as a bad exit, or it kills the others while they save. So each process
# leaves a mark and exits with 0, and the job goes back to the queue, unless Slurm has put
# it there already, or it was cancelled: then it does not count as running any more.
# In an array, one task has the number of the whole array, hence the longer name.
# The shell around a process gets SIGTERM as well, and waits.
_BODY = """\
job="$SLURM_JOB_ID"
if [[ -n "${{SLURM_ARRAY_TASK_ID:-}}" ]]; then
  job="${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
saved=".saved-$job"
rm -f "$saved"
srun --kill-on-bad-exit=1 bash -c '
  trap : TERM
  "$@"
  status=$?
  if ((status == {saved})); then
    : > "$0"
    status=0
  fi
  exit "$status"
' "$saved" {command}
status=$?
if ((status == 0)) && [[ -e "$saved" ]]; then
  rm -f "$saved"
  if [[ "$(squeue --noheader --jobs="$job" --format=%T)" == RUNNING ]]; then
    scontrol requeue "$job"
  fi
  exit {saved}
fi
exit "$status"
"""


def _check(job: Job, options: Options) -> None:
    job.refuse("slurm", kind=("cpu", "gpu"))
    if job.kind == "gpu" and min(job.processes_per_host, job.devices_per_process) > 1:
        raise LaunchError(
            f"processes_per_host={job.processes_per_host} with devices_per_process="
            f"{job.devices_per_process}: under slurm take one process per host, or one "
            "device per process"
        )
    if options.after is not None and not options.after.isdecimal():
        raise LaunchError(f"after={options.after!r} must be the number of a job")
    try:
        shlex.split(options.sbatch)
    except ValueError as error:
        raise LaunchError(f"sbatch={options.sbatch!r}: {error}") from None
    if not Path(job.directory).is_absolute():
        raise LaunchError(f"directory={job.directory!r} must be absolute under slurm")
    wants_index = any(INDEX in word for word in job.command)
    if options.array is None:
        if wants_index:
            raise LaunchError(f"array=None, but the command has {INDEX}; set --array")
    elif not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*(%[1-9]\d*)?", options.array):
        raise LaunchError(f"array={options.array!r} must be as in 0-3,7 or 0-99%8")
    elif not wants_index:
        raise LaunchError(
            f"array={options.array!r}, but the command has no {INDEX}: all would run the "
            "same"
        )


def _directives(job: Job, options: Options) -> list[str]:
    lines = [
        f"--job-name={job.name}",
        f"--nodes={job.hosts}",
        f"--ntasks-per-node={job.processes_per_host}",
        f"--chdir={job.directory}",
        f"--output=slurm-%x-{'%A_%a' if options.array else '%j'}.out",
        "--open-mode=append",  # of a job that is requeued, all logs are kept
        "--requeue",
        f"--signal=TERM@{GRACE_SECONDS}",  # to the processes, before the time limit
    ]
    if job.kind == "gpu":
        model = f"{job.model}:" if job.model else ""
        # All of a host's to each of its processes: --gpus-per-task would renumber them.
        count = job.processes_per_host * job.devices_per_process
        lines.append(f"--gres=gpu:{model}{count}")
    if job.minutes is not None:
        lines.append(f"--time={job.minutes}")
    if options.partition is not None:
        lines.append(f"--partition={options.partition}")
    if options.array is not None:
        lines.append(f"--array={options.array}")
    if options.after is not None:
        lines.append(f"--dependency=afterany:{options.after}")
    return [*lines, *shlex.split(options.sbatch)]


def _visible_devices(job: Job) -> dict[str, str]:
    # Under Slurm, JAX gives each process the one device of its number on the host.
    if job.kind == "cpu" or job.devices_per_process == 1:
        return {}
    return {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(job.devices_per_process)))}


def _words(command: tuple[str, ...]) -> str:
    index = '"$SLURM_ARRAY_TASK_ID"'
    return " ".join(
        index.join(shlex.quote(part) if part else "" for part in word.split(INDEX))
        if INDEX in word
        else shlex.quote(word)
        for word in command
    )
