"""Two processes are one run: the same result, the same end, and no process left behind."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from dpjax.training.ledger import Ledger, NoiseReuseError
from dpjax.training.train import Interrupted, train
from experiments.train import main
from tests.checks import assert_close, norm
from tests.runs import ROOT, assert_same_export, crash_after, exported, metrics, tiny

pytestmark = pytest.mark.usefixtures("shared_steps")

TINY = "--config=tests/tiny_config.py"
FLAGS = (
    "--config.mesh.data=2",
    "--config.mesh.fsdp=2",
    "--config.model.features=()",
)
NEVER = "SIGTERM@1000"


def small(**changes):
    """What the processes train, with few parameters: compiling is most of the time."""
    return tiny(**{"model.features": ()} | changes)


def train_here(workdir, **changes):
    """Train in this process."""
    train(small(**changes), workdir)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_processes(workdir, *, event=NEVER, flags=((), ())):
    """Run two processes of two devices; return the status and output of each."""
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": ".cache/jax-tests",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    port = free_port()
    peers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.peer", event),
                *(TINY, f"--workdir={workdir}", *FLAGS, *flags[number]),
                *(f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"),
                f"--process_id={number}",
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        texts = [peer.communicate(timeout=200)[0] for peer in peers]
    finally:
        for peer in peers:
            peer.kill()
    return [(peer.returncode, text) for peer, text in zip(peers, texts, strict=True)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process on one device."""
    workdir = tmp_path_factory.mktemp("alone")
    train_here(workdir)
    return workdir


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The same run, of two processes."""
    workdir = tmp_path_factory.mktemp("together")
    ended = two_processes(workdir)
    assert [status for status, _ in ended] == [0, 0], ended
    assert "test/accuracy" in ended[0][1]
    assert "plan" not in ended[1][1]
    return workdir


def assert_close_export(one, other):
    a, b = exported(one), exported(other)
    assert_close(a, b, rtol=1e-5, scale=norm(b))


def test_a_run_of_two_processes_is_the_run_of_one(alone, together):
    assert_close_export(together, alone)
    for left, right in zip(metrics(together), metrics(alone), strict=True):
        assert left == pytest.approx(right, rel=1e-4)
    for name in ("privacy_card.json", "privacy_card.md"):
        assert (together / name).read_text() == (alone / name).read_text()


@pytest.mark.long
def test_after_kill_9_of_one_process_the_other_ends_and_a_restart_is_undisturbed(
    together, tmp_path
):
    killed, other = two_processes(tmp_path, event="SIGKILL@9")[::-1]
    assert killed[0] == -signal.SIGKILL
    assert other[0] not in (0, 75)
    assert "since another one has died" in other[1]
    assert not (tmp_path / "export").exists()
    assert [status for status, _ in two_processes(tmp_path)] == [0, 0]
    assert_same_export(tmp_path, together)


@pytest.mark.long
def test_a_run_goes_on_on_another_number_of_processes_and_devices(
    alone, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        term_after(patch, 2)
        with pytest.raises(Interrupted, match="step 4 of"):
            train_here(tmp_path)
    # A signal to one process stops both, after the same step.
    ended = two_processes(tmp_path, event="SIGTERM@5")
    assert [status for status, _ in ended] == [75, 75], ended
    (step,) = {
        re.search(r"interrupted: saved step (\d+)", text)[1] for _, text in ended
    }
    assert 6 <= int(step) < 12
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path, elsewhere, ignore=lambda *_: ["elsewhere"])
    train_here(tmp_path, **{"mesh.data": 4})
    assert_close_export(tmp_path, alone)
    train_here(elsewhere)
    assert_close_export(elsewhere, alone)
    lines = (tmp_path / "ledger.txt").read_text().splitlines()
    layouts = [line.split()[2] for line in lines]
    assert layouts == ["1x1/1/cpu"] * 4 + ["2x2/2/cpu"] * (int(step) - 4) + [
        "4x1/1/cpu"
    ] * (12 - int(step))


def term_after(patch, step):
    record = Ledger.record

    def recording(self, number, fingerprint):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        record(self, number, fingerprint)

    patch.setattr(Ledger, "record", recording)


def test_steps_after_the_checkpoint_are_not_replayed_on_another_layout(
    tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        crash_after(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            train_here(tmp_path)
    before = (tmp_path / "ledger.txt").read_text()
    with pytest.raises(
        NoiseReuseError, match="step 4 was released on 1x1/1/cpu, after"
    ):
        train_here(tmp_path, **{"mesh.data": 4})
    assert (tmp_path / "ledger.txt").read_text() == before
    train_here(tmp_path)


@pytest.mark.long
def test_secrets_of_the_operating_system_are_those_of_the_first_process(tmp_path):
    flags = ["--config.run.seed=None"]
    ended = two_processes(tmp_path, flags=(flags, flags))
    assert [status for status, _ in ended] == [0, 0], ended
    starts = [re.search(r"starts with (\w{64})", text)[1] for _, text in ended]
    assert starts[0] == starts[1]


def test_processes_with_different_configs_refuse_and_leave_nothing(tmp_path):
    workdir = tmp_path / "run"
    ended = two_processes(workdir, flags=((), ("--config.run.log_every=5",)))
    for number, (status, text) in enumerate(ended):
        assert status == 2
        assert (
            f"process {1 - number} of this run differs in run.log_every from process "
            f"{number}; start all with one command" in text
        )
    assert not workdir.exists()


ALONE = """
from dpjax.parallel import processes
processes.START_TIMEOUT = 1
with processes.joined(coordinator_address="{address}", num_processes=2, process_id=0):
    raise AssertionError
"""


def test_a_process_that_waits_in_vain_says_so():
    address = f"127.0.0.1:{free_port()}"
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(address=address)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode not in (0, 1)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"error: the processes of this run did not meet at {address}"
    )
    assert last.endswith("within 1 seconds: start all of them")


def test_an_occupied_port_is_named_and_nothing_started(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        flags = [f"--coordinator_address={address}", "--num_processes=2"]
        argv = [TINY, f"--workdir={tmp_path / 'run'}", *flags, "--process_id=0"]
        assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --coordinator_address={address}: port")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
