"""Several processes as one run: how they start, agree, stop and fail together.

Everything here is a plain call in a run of one process.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

START_TIMEOUT: Final = 120
"""Seconds that processes wait for one another at the start."""

HEARTBEAT_TIMEOUT: Final = 30
"""Seconds without a sign of life after which a process counts as dead."""

_GRACE: Final = 10
"""Seconds that a process which failed waits for the others to leave in order."""


class StartError(RuntimeError):
    """The processes of a run did not find one another; nothing was started."""


class PeerError(RuntimeError):
    """Another process of the run is gone."""


@contextlib.contextmanager
def joined(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Iterator[None]:
    """Be one process of several while the context lasts, and until the interpreter exits.

    A process that fails inside leaves after some seconds, whatever the others do. They
    end too: their next collective fails, or the missing heartbeat is noticed.
    JAX aborts a process that waits for the others in vain, and it says so.

    Args:
        coordinator_address: ``HOST:PORT`` on the host of process 0; None, like the others,
            for what the scheduler says (Slurm, Open MPI, Kubernetes, TPU pods).
        num_processes: How many there are.
        process_id: Which one this is, from 0.

    Raises:
        StartError: The port is taken, or no scheduler is found.
        PeerError: A collective failed inside, as when another process has died.
    """
    if process_id == 0:
        _check_port_is_free(str(coordinator_address))
    # On CPU, programs that were dispatched together run in any order: what one process
    # sends for one of them, another would take for its own part of the next.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    where = f"at {coordinator_address}" if coordinator_address else "by detection"
    missed = f"the processes of this run did not meet {where}"
    try:
        with _witness(f"{missed} within {START_TIMEOUT} seconds: start all of them"):
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                initialization_timeout=START_TIMEOUT,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            )
    except (ValueError, RuntimeError) as error:
        raise StartError(
            f"{missed}: {_first_line(error)}; under a scheduler use --distributed=auto, "
            "else --coordinator_address, --num_processes and --process_id"
        ) from error
    try:
        with _witness(
            f"process {jax.process_index()} of {jax.process_count()} was ended, most "
            "likely since another one has died (see its output); the checkpoints are "
            "intact, start all again"
        ):
            yield
    except BaseException as error:
        # The ordinary exit waits for the others, who may be waiting for this process.
        timer = threading.Timer(_GRACE, _leave)
        timer.daemon = True
        timer.start()
        if isinstance(error, jax.errors.JaxRuntimeError) and not is_exhausted(error):
            raise PeerError(
                f"process {jax.process_index()} of {jax.process_count()} stops, most "
                "likely since another one has died (see its output); the checkpoints are "
                f"intact, start all again: {_first_line(error)}"
            ) from error
        raise


@contextlib.contextmanager
def _witness(text: str) -> Iterator[None]:
    """Have ``text`` said if this process is aborted.

    When a process dies, or does not come, the libraries of the others abort them, mostly
    before Python sees an error. A small child of this process waits for its end, and
    speaks unless all went in order.
    """
    command = [sys.executable, "-I", "-S", "-c", _SPEAK, text]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, start_new_session=True
    ) as child:
        try:
            yield
        finally:
            child.communicate(b"in order")


_SPEAK: Final = (
    "import sys; sys.stdin.read() or print('error:', sys.argv[1], file=sys.stderr)"
)


def is_exhausted(error: BaseException) -> bool:
    """Return whether a device, or the host, had too little memory."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]


def _check_port_is_free(address: str) -> None:
    # The service would share the port with whatever else listens there.
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError as error:
            raise StartError(
                f"--coordinator_address={address}: port {port} cannot be used here "
                f"({error.strerror}); choose another"
            ) from error


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def is_first() -> bool:
    """Return whether this is the process that writes and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def of_first(tree: PyTree) -> PyTree:
    """Return what the first process has: for secrets, which each would draw anew.

    Args:
        tree: Arrays or typed keys, of the same shapes in each process.
    """
    if jax.process_count() == 1:
        return tree

    def sent(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.asarray(multihost_utils.broadcast_one_to_all(leaf))
        data = multihost_utils.broadcast_one_to_all(jax.random.key_data(leaf))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))

    return jax.tree.map(sent, tree)


def texts_of_all(text: str) -> list[str]:
    """Return the ``text`` of each process, in order."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [
        row[:length].tobytes().decode()
        for row, length in zip(rows, lengths, strict=True)
    ]


def to_host(tree: PyTree) -> PyTree:
    """Return the whole of each array as numpy; all processes must ask for it."""

    def fetch(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array):
            return np.asarray(leaf)
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(fetch, tree)


@contextlib.contextmanager
def interruptions() -> Iterator[Callable[[int], bool]]:
    """Collect SIGTERM and SIGINT, so that a step is never cut in two.

    Yields:
        ``step -> bool``, to be called once after each step: whether to save it and stop.
        A signal to any one process makes all of them stop after the same step.
    """
    seen: list[int] = []
    alone = jax.process_count() == 1

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        print("saving after this step; a second signal stops at once", file=sys.stderr)
        if not alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def stop(step: int) -> bool:
        return (
            bool(seen) if alone else multihost_utils.reached_preemption_sync_point(step)
        )

    # With several processes SIGTERM belongs to JAX, which lets them agree on a step.
    signals = (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,)
    old = [signal.signal(number, handle) for number in signals]
    try:
        yield stop
    finally:
        for number, handler in zip(signals, old, strict=True):
            signal.signal(number, handler)
