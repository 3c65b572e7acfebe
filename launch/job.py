"""What to run, and the call that hands it to a scheduler."""

import dataclasses
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

COORDINATOR_PORT = 8476
"""Where process 0 listens, on machines that the job has for itself."""

GRACE_SECONDS = 90
"""From SIGTERM to SIGKILL: what a process has to save its state."""

SAVED = 75
"""Exit status (EX_TEMPFAIL) of a process that was told to stop and has saved its state."""


class LaunchError(ValueError):
    """A job that cannot be started; the message is one line with the option and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A command, run by ``hosts * processes_per_host`` processes that know of each other.

    With more than one process, the command gets the flags by which ``experiments.train``
    finds the others: ``--coordinator_address=HOST:PORT --num_processes=N --process_id=I``,
    or under Slurm, which tells the processes itself, ``--distributed=auto``.

    Attributes:
        name: Lower-case letters, digits and hyphens.
        command: Program and arguments.
        hosts: Machines.
        processes_per_host: Processes on each.
        accelerator: "cpu", "gpu", "gpu:MODEL" or "tpu:TYPE", as the scheduler names them.
        devices_per_process: Accelerators of one process; virtual devices for "cpu".
        minutes: Time limit, None for the scheduler's own. Processes get SIGTERM in time
            to save.
        directory: Root of the repository, where the command starts. On the cluster for
            slurm, in the image for jobset; on this machine for the others.
        environment: Variables to set.
    """

    name: str
    command: tuple[str, ...]
    hosts: int = 1
    processes_per_host: int = 1
    accelerator: str = "cpu"
    devices_per_process: int = 1
    minutes: int | None = None
    directory: str = "."
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
            raise LaunchError(
                f"name={self.name!r} must be at most 40 lower-case letters, digits and "
                "hyphens, and start with a letter"
            )
        if not self.command:
            raise LaunchError("command=() is empty; write it after --")
        for field in ("hosts", "processes_per_host", "devices_per_process", "minutes"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise LaunchError(f"{field}={value} must be at least 1")
        if self.kind not in ("cpu", "gpu", "tpu") or self.accelerator.endswith(":"):
            raise LaunchError(
                f"accelerator={self.accelerator!r} must be cpu, gpu, gpu:MODEL or tpu:TYPE"
            )
        if self.kind == "cpu" and self.model:
            raise LaunchError(f"accelerator={self.accelerator!r}: cpu has no model")
        for key in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII):
                raise LaunchError(f"env={key!r} is not the name of a variable")

    @property
    def processes(self) -> int:
        """All processes of the job."""
        return self.hosts * self.processes_per_host

    @property
    def kind(self) -> str:
        """``cpu``, ``gpu`` or ``tpu``."""
        return self.accelerator.partition(":")[0]

    @property
    def model(self) -> str:
        """What follows the colon in ``accelerator``, or ""."""
        return self.accelerator.partition(":")[2]

    @property
    def variables(self) -> dict[str, str]:
        """``environment``, and what makes JAX use as many CPU devices as asked for."""
        if self.kind != "cpu":
            return dict(self.environment)
        devices = str(self.devices_per_process)
        cpu = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": devices}
        return {**cpu, **self.environment}

    def refuse(self, scheduler: str, **limits: int | tuple[str, ...]) -> None:
        """Raise LaunchError for a field beyond what a scheduler can do.

        Args:
            scheduler: Its name, for the message.
            **limits: Field -> the largest number; kind or model of the accelerator -> the
                values allowed.
        """
        for field, allowed in limits.items():
            value = getattr(self, field)
            if isinstance(allowed, int) and value > allowed:
                raise LaunchError(
                    f"{field}={value}: {scheduler} takes at most {allowed}"
                )
            if isinstance(allowed, tuple) and value not in allowed:
                wanted = " or ".join(filter(None, allowed)) or f"{self.kind}, no model"
                raise LaunchError(
                    f"accelerator={self.accelerator!r}: {scheduler} takes {wanted}"
                )


def process_flags(
    job: Job, *, coordinator: str, process_id: str | int
) -> tuple[str, ...]:
    """Return the flags by which a process finds the others, none if it is alone."""
    if job.processes == 1:
        return ()
    return (
        f"--coordinator_address={coordinator}",
        f"--num_processes={job.processes}",
        f"--process_id={process_id}",
    )


def exports(variables: Mapping[str, str]) -> str:
    """Return lines of shell that set ``variables``."""
    return "".join(f"export {k}={shlex.quote(v)}\n" for k, v in variables.items())


def limited(job: Job, words: str) -> str:
    """Return shell words of a command that gets SIGTERM at the job's time limit."""
    if job.minutes is None:
        return words
    # In the foreground: otherwise timeout signals its whole process group, itself
    # included, and the command is told twice, which means "at once" to it.
    return (
        "timeout --foreground --preserve-status --signal=TERM "
        f"--kill-after={GRACE_SECONDS} {job.minutes}m {words}"
    )


@dataclasses.dataclass(frozen=True)
class Call:
    """A file, and the command that hands it to a scheduler.

    Attributes:
        file: Name of the file.
        text: Its content.
        argv: The command before the file's name.
        tool: The program that must be installed.
    """

    file: str
    text: str
    argv: tuple[str, ...]
    tool: str

    def __str__(self) -> str:
        command = shlex.join([*self.argv, self.file])
        return f"cat > {self.file} <<'END'\n{self.text}END\n{command}\n"

    def run(self, *, output: Literal["shown", "returned"]) -> str:
        """Run the command; return what it printed, if asked to.

        Raises:
            LaunchError: The tool is not installed, or failed.
        """
        if shutil.which(self.tool) is None:
            raise LaunchError(
                f"{self.tool} is not installed here; --dry_run shows what it would get"
            )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.file
            path.write_text(self.text)
            done = subprocess.run(
                [*self.argv, str(path)],
                stdout=subprocess.PIPE if output == "returned" else None,
                stderr=subprocess.PIPE if output == "returned" else None,
                text=True,
                check=False,
            )
        if done.returncode:
            said = f": {done.stderr.strip()}" if done.stderr else ""
            raise LaunchError(f"{self.tool} failed ({done.returncode}){said}")
        return done.stdout or ""
