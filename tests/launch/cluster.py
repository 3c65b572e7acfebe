"""Debian's Slurm on this machine, with two virtual nodes, as long as a test needs it.

Nothing outside one folder is touched: own configuration, own munge key, free ports.
"""

import contextlib
import getpass
import os
import random
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")

# JAX takes the name of the first node as the address of process 0, so the names of the
# nodes must be addresses, and all of 127.0.0.0/8 is this machine.
NODES = ("127.0.0.1", "127.0.0.2")

# A job that is requeued starts when its credentials have expired, else after two minutes.
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
FirstJobId={first_job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
"""


def missing() -> list[str]:
    """Name the programs that are not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    return [name for name in PROGRAMS if not shutil.which(name, path=path)]


@contextlib.contextmanager
def slurm(folder: Path):
    """Run Slurm until the end of the block; ``SLURM_CONF`` makes its commands find it."""
    host = socket.gethostname().partition(".")[0]
    free = _free_ports(1 + len(NODES))
    text = CONFIG.format(
        host=host,
        folder=folder,
        user=getpass.getuser(),
        controller_port=free[0],
        # JAX makes its port from the number of the job: another one for each test run.
        first_job=random.randrange(1, 2**16),
    )
    for name, port in zip(NODES, free[1:], strict=True):
        text += f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8\n"
    text += "PartitionName=main Nodes=ALL Default=YES\n"
    (folder / "slurm.conf").write_text(text)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    munge = {
        "socket": "munge.socket",
        "key-file": "munge.key",
        "pid-file": "munged.pid",
    }
    munge |= {"log-file": "munged.log", "seed-file": "munged.seed"}
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    with contextlib.ExitStack() as stack:
        stack.callback(os.environ.pop, "SLURM_CONF")

        def start(*words):
            stack.enter_context(_daemon(folder, *words))

        flags = [f"--{name}={folder / file}" for name, file in munge.items()]
        start("munged", "--foreground", "--force", *flags)
        until(lambda: (folder / "munge.socket").exists(), "munged does not answer")
        start("slurmctld", "-D")
        for name in NODES:
            start("slurmd", "-D", "-N", name)
        until(lambda: _says("sinfo", "-h", "-o", "%D %T") == "2 idle", _logs(folder))
        stack.callback(_cancel_all)
        yield


def states(job_id: str) -> dict[str, str]:
    """Return ``{"ID" or "ID_INDEX": state}`` of a job or array, ended ones too."""
    said = _says("squeue", "-h", "-r", "-t", "all", "-j", job_id, "-o", "%i %T")
    return dict(line.split() for line in said.splitlines())


def wait_for(job_id: str, *, seconds: float = 120) -> dict[str, str]:
    """Wait until a job or array has ended; return the states."""
    busy = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}
    until(
        lambda: not busy & set(states(job_id).values()),
        lambda: f"{states(job_id)} after {seconds} s",
        seconds=seconds,
    )
    return states(job_id)


@contextlib.contextmanager
def _daemon(folder, *words):
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    with open(folder / f"{'-'.join(words[:4]).replace('/', '')}.log", "w") as log:
        process = subprocess.Popen(
            # If even the test dies, they die with it.
            ["setpriv", "--pdeathsig=TERM", *words],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _cancel_all():
    _says("scancel", "--user", getpass.getuser())
    until(lambda: not _says("squeue", "-h"), lambda: _says("squeue"), seconds=40)


def _says(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _logs(folder):
    return lambda: "\n".join(f.read_text() for f in folder.glob("*.log"))


def until(condition, complaint, *, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(complaint() if callable(complaint) else complaint)
        time.sleep(0.1)


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
