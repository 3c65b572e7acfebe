"""This host: one process group per process; when one dies, all end."""

import contextlib
import dataclasses
import io
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from launch.job import GRACE_SECONDS, SAVED, Job, LaunchError, process_flags

# A peer of a process that died is stuck in a collective: it cannot save.
_BEREAVED_SECONDS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a job runs on this host.

    Attributes:
        port: Where process 0 listens; None for any that is free.
    """

    port: int | None = None


def commands(
    job: Job, options: Options
) -> list[tuple[tuple[str, ...], dict[str, str]]]:
    """Return command and variables of each process.

    Raises:
        LaunchError: The job does not fit, or the port is occupied.
    """
    job.refuse("local", hosts=1, kind=("cpu", "gpu"), model=("",))
    coordinator = f"127.0.0.1:{_free_port(options.port)}"
    return [
        (
            (
                *job.command,
                *process_flags(job, coordinator=coordinator, process_id=process_id),
            ),
            job.variables | _visible_devices(job, process_id),
        )
        for process_id in range(job.processes)
    ]


def show(job: Job, options: Options) -> str:
    """Return shell lines, one for each process."""
    return "".join(
        f"{''.join(f'{k}={shlex.quote(v)} ' for k, v in variables.items())}"
        f"{shlex.join(command)} &\n"
        for command, variables in commands(job, options)
    )


def run(job: Job, options: Options) -> int:
    """Run ``job`` to its end; return its exit status.

    Output is passed on, each line after the number of its process. SIGTERM and SIGINT are
    passed on to every process, and SIGTERM is sent at the time limit. When a process fails,
    the others are stopped; when one exits with 75 (it has saved its state), the others
    have the time to do the same.

    Returns:
        The status of the first process that failed (128 + N if signal N killed it),
        else 75 if one had it, else 0.

    Raises:
        LaunchError: The job does not fit, the port is occupied, or the command cannot be
            started.
    """
    processes: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    with _received() as received:
        try:
            for command, variables in commands(job, options):
                processes.append(_start(command, variables, job.directory))
                readers.append(_reader(len(readers), processes[-1]))
            return _wait(processes, received, job.minutes)
        finally:
            for process in processes:
                _kill(process)
            for reader in readers:
                reader.join(_BEREAVED_SECONDS)


def _wait(
    processes: Sequence[subprocess.Popen[str]],
    received: list[int],
    minutes: int | None,
) -> int:
    limit = None if minutes is None else time.monotonic() + 60 * minutes
    deadline, failed = None, None
    while None in (codes := [process.poll() for process in processes]):
        now = time.monotonic()
        while received:
            _signal_all(processes, received.pop(0))
        if failed is None and (bad := [c for c in codes if c not in (None, 0, SAVED)]):
            failed, deadline = bad[0], now + _BEREAVED_SECONDS
            _signal_all(processes, signal.SIGTERM)
        elif deadline is None and SAVED in codes:
            deadline = now + GRACE_SECONDS
        elif limit is not None and now > limit:
            limit, deadline = None, now + GRACE_SECONDS
            _signal_all(processes, signal.SIGTERM)
        elif deadline is not None and now > deadline:
            _signal_all(processes, signal.SIGKILL)
        time.sleep(0.05)
    ended = [failed or 0, *(process.wait() for process in processes)]
    status = next((code for code in ended if code not in (0, SAVED)), max(ended))
    return 128 - status if status < 0 else status


def _start(
    command: tuple[str, ...], variables: Mapping[str, str], directory: str
) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command,
            cwd=directory,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A group of its own, or Ctrl-C would reach it twice: a second signal stops
            # the trainer at once.
            process_group=0,
        )
    except OSError as error:
        raise LaunchError(
            f"command={command[0]!r} cannot be started: {error}"
        ) from None


def _reader(process_id: int, process: subprocess.Popen[str]) -> threading.Thread:
    def copy() -> None:
        with process.stdout or io.StringIO() as stream:
            for line in stream:
                print(f"[{process_id}] {line}", end="", flush=True)

    # A daemon: something that left the process's group may keep the stream open.
    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def _received() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        seen.append(number)

    signals = (signal.SIGTERM, signal.SIGINT)
    old = [signal.signal(number, note) for number in signals]
    try:
        yield seen
    finally:
        for number, handler in zip(signals, old, strict=True):
            signal.signal(number, handler)


def _signal_all(processes: Sequence[subprocess.Popen[str]], number: int) -> None:
    for process in processes:
        process.send_signal(number)  # does nothing if the process has ended


def _kill(process: subprocess.Popen[str]) -> None:
    """End what is left of a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port(wanted: int | None) -> int:
    if wanted is not None and not 0 < wanted < 2**16:
        raise LaunchError(f"port={wanted} must be from 1 to {2**16 - 1}")
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise LaunchError(
                f"port={wanted} cannot be used ({error.strerror}); leave --port out for a "
                "free one"
            ) from None
        return probe.getsockname()[1]


def _visible_devices(job: Job, process_id: int) -> dict[str, str]:
    if job.kind == "cpu":
        return {}
    first = process_id * job.devices_per_process
    devices = range(first, first + job.devices_per_process)
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))}
