"""SkyPilot: a task on machines of any cloud it knows."""

import dataclasses
import os
import shlex
from typing import Any

import yaml

from launch.job import (
    COORDINATOR_PORT,
    Call,
    Job,
    LaunchError,
    limited,
    process_flags,
)

_SETUPS = {
    "cpu": "make .venv/installed",
    "gpu": (
        "make .venv/installed && .venv/bin/pip install -c constraints.txt 'jax[cuda13]'"
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How SkyPilot runs a job.

    Attributes:
        setup: Shell command, run once on each machine before the job; None for the
            environment of the repository, with JAX for the accelerator.
        infra: Where, as in "gcp/us-central1"; None for the cheapest.
        idle_minutes: Stop the machines, keeping their disks, when idle for so long.
    """

    setup: str | None = None
    infra: str | None = None
    idle_minutes: int = 30


def render(job: Job, options: Options) -> Call:
    """Return the call of sky.

    Raises:
        LaunchError: The job does not fit.
    """
    job.refuse("sky", processes_per_host=1, kind=("cpu", "gpu"))
    if options.idle_minutes < 0:
        raise LaunchError(f"idle_minutes={options.idle_minutes} must be at least 0")
    if job.kind == "gpu" and not job.model:
        raise LaunchError("accelerator='gpu': sky needs a model, as in gpu:H100")
    resources: dict[str, Any] = {}
    if job.kind == "gpu":
        resources["accelerators"] = f"{job.model}:{job.devices_per_process}"
    if options.infra is not None:
        resources["infra"] = options.infra
    task = {
        "name": job.name,
        "workdir": os.path.abspath(job.directory),
        "num_nodes": job.hosts,
        "resources": resources,
        "envs": job.variables,
        "setup": _SETUPS[job.kind] if options.setup is None else options.setup,
        "run": _run(job),
    }
    text = yaml.safe_dump(task, sort_keys=False, width=1000)
    argv = (
        "sky",
        "launch",
        "--yes",
        f"--cluster={job.name}",
        f"--idle-minutes-to-autostop={options.idle_minutes}",
        "--detach-run",
    )
    return Call(f"{job.name}.yaml", text, argv, tool="sky")


def _run(job: Job) -> str:
    flags = process_flags(
        job,
        coordinator=f'$(head -n1 <<< "$SKYPILOT_NODE_IPS"):{COORDINATOR_PORT}',
        process_id="$SKYPILOT_NODE_RANK",
    )
    words = " ".join([shlex.join(job.command), *(f'"{flag}"' for flag in flags)])
    return limited(job, words) + "\n"
