"""Two processes are one run: the same result, the same end, and no process left behind."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from dpjax.privacy.noise import root_key
from dpjax.training.checkpoint import Checkpoints
from dpjax.training.experiment import build_experiment
from dpjax.training.ledger import Ledger, NoiseReuseError
from dpjax.training.state import init_state
from dpjax.training.train import Interrupted, train
from dpjax.transforms import private
from experiments.train import main
from tests.checks import assert_close, norm
from tests.runs import ROOT, assert_same_export, crash_after, exported, metrics, tiny

pytestmark = pytest.mark.usefixtures("shared_steps")

TINY = "--config=tests/tiny_config.py"
SHARDED, HYBRID = (1, 8, 1), (2, 4, 1)
"""Parameters and all that is like them over all devices; over those of a process."""
RULES = ((".*", "largest", -1),)
ADAM = {"optimizer.name": "optax:adam", "optimizer.learning_rate": 0.05}
NEVER = "SIGTERM@1000"


def small(mesh=(1, 1, 1), variant="dpsgd"):
    """What the processes train, with few parameters: compiling is most of the time."""
    places = dict(zip(("mesh.data", "mesh.fsdp", "mesh.model"), mesh, strict=True))
    few = {"model.features": (), "mesh.rules": RULES}
    return tiny(variant, **few | ADAM | places)


def train_here(workdir, mesh=(1, 1, 1), variant="dpsgd"):
    """Train in this process."""
    train(small(mesh, variant), workdir)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_processes(workdir, mesh, *, event=NEVER, variant="dpsgd", flags=((), ())):
    """Run two processes of four devices; return the status and output of each."""
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_COMPILATION_CACHE_DIR": ".cache/jax-tests",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    data, fsdp, _ = mesh
    layout = (
        f"--config.mesh.data={data}",
        f"--config.mesh.fsdp={fsdp}",
        f"--config.mesh.rules={RULES}",
        "--config.model.features=()",
        *(f"--config.{key}={value}" for key, value in ADAM.items()),
    )
    port = free_port()
    peers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.peer", event),
                *(f"{TINY}:{variant}", f"--workdir={workdir}", *layout, *flags[number]),
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
    """The same run, of two processes that hold half of its state each."""
    workdir = tmp_path_factory.mktemp("together")
    return run_together(workdir, SHARDED)


def run_together(workdir, mesh, **options):
    ended = two_processes(workdir, mesh, **options)
    assert [status for status, _ in ended] == [0, 0], ended
    assert "test/accuracy" in ended[0][1]
    assert "plan" not in ended[1][1]
    return workdir


def assert_close_export(one, other):
    a, b = exported(one), exported(other)
    assert_close(a, b, rtol=1e-5, scale=norm(b))


def test_a_run_of_two_processes_is_the_run_of_one(alone, together):
    check_same_run(together, alone)


@pytest.mark.long
def test_so_is_a_run_of_two_replicas(alone, tmp_path):
    check_same_run(run_together(tmp_path, HYBRID), alone)


@pytest.mark.long
def test_so_is_one_whose_error_memory_is_split(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train_here(one, variant="dicesgd")
    check_same_run(run_together(two, SHARDED, variant="dicesgd"), one)


def check_same_run(together, alone):
    assert_close_export(together, alone)
    for left, right in zip(metrics(together), metrics(alone), strict=True):
        assert left == pytest.approx(right, rel=1e-4)
    for name in ("privacy_card.json", "privacy_card.md"):
        assert (together / name).read_text() == (alone / name).read_text()


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_a_checkpoint_of_two_processes_is_restored_on_other_layouts(together, mesh):
    # All of the state is compared with the fingerprints that were saved with it.
    state = restored(together, mesh)
    _, fsdp, model = mesh
    kernels = [x for x in jax.tree.leaves(state) if x.shape == (64, 10)]
    assert len(kernels) == 4  # parameters, two moments, average
    for leaf in kernels:
        assert leaf.sharding.shard_shape(leaf.shape) == (64 // fsdp, 10 // model)
    last = jax.tree.map(np.asarray, state.average)
    jax.tree.map(np.testing.assert_array_equal, last, exported(together))


def restored(workdir, mesh):
    config = small(mesh)
    experiment = build_experiment(config)
    transform = private(
        experiment.mechanism, experiment.optimizer, noise_key=root_key(2)
    )
    fresh = init_state(config, experiment, transform)
    with Checkpoints(workdir / "checkpoints", keep=2) as saved:
        step, state = saved.restore(fresh)
    assert step == 12
    return state


@pytest.mark.long
def test_after_kill_9_of_one_process_the_other_ends_and_a_restart_is_undisturbed(
    together, tmp_path
):
    killed, other = two_processes(tmp_path, SHARDED, event="SIGKILL@9")[::-1]
    assert killed[0] == -signal.SIGKILL
    assert other[0] not in (0, 75)
    assert "since another one has died" in other[1]
    assert not (tmp_path / "export").exists()
    assert [status for status, _ in two_processes(tmp_path, SHARDED)] == [0, 0]
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
    ended = two_processes(tmp_path, SHARDED, event="SIGTERM@5")
    assert [status for status, _ in ended] == [75, 75], ended
    (step,) = {
        re.search(r"interrupted: saved step (\d+)", text)[1] for _, text in ended
    }
    assert 6 <= int(step) < 12
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path, elsewhere, ignore=lambda *_: ["elsewhere"])
    train_here(tmp_path, (2, 2, 2))
    assert_close_export(tmp_path, alone)
    train_here(elsewhere)
    assert_close_export(elsewhere, alone)
    lines = (tmp_path / "ledger.txt").read_text().splitlines()
    layouts = [line.split()[2] for line in lines]
    assert layouts == ["1x1/1/cpu"] * 4 + ["1x8/2/cpu"] * (int(step) - 4) + [
        "2x2x2/1/cpu"
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
        train_here(tmp_path, (4, 1, 1))
    assert (tmp_path / "ledger.txt").read_text() == before
    train_here(tmp_path)


WIDE = (
    "--config.model.features=(2048,2048,2048,2048,2048,2048,2048,2048,2048,2048)",
    "--config.mechanism.steps=2",
    "--config.mechanism.sampling.rate=0.02",
    "--config.compute.physical_batch_size=8",
    "--config.compute.engine=ghost",
    "--config.evaluation.ema_decay=0.0",
)
"""38 million parameters, 151 MB; with two moments and a sum 606 MB, in replicas on each of
four devices 2.4 GB."""


def test_a_model_that_a_process_cannot_hold_is_refused_with_the_layout_to_use(tmp_path):
    workdir, flags = tmp_path / "run", (WIDE, WIDE)
    limit = "RLIMIT_AS@2000000000"
    ended = two_processes(workdir, (8, 1, 1), event=limit, flags=flags)
    for status, text in ended:
        assert status == 2
        message = next(x for x in text.splitlines() if x.startswith("error:"))
        assert "each device would hold 6" in message
        assert "set config.mesh.data=4, fsdp=2, model=1, where it would" in message
    assert not workdir.exists()


@pytest.mark.long
def test_it_is_trained_by_two_processes_that_hold_a_part_each(tmp_path):
    ended = two_processes(
        tmp_path, SHARDED, event="RLIMIT_AS@2000000000", flags=(WIDE, WIDE)
    )
    assert [status for status, _ in ended] == [0, 0], ended


@pytest.mark.long
def test_secrets_of_the_operating_system_are_those_of_the_first_process(tmp_path):
    flags = ["--config.run.seed=None"]
    ended = two_processes(tmp_path, HYBRID, flags=(flags, flags))
    assert [status for status, _ in ended] == [0, 0], ended
    starts = [re.search(r"starts with (\w{64})", text)[1] for _, text in ended]
    assert starts[0] == starts[1]


def test_processes_with_different_configs_refuse_and_leave_nothing(tmp_path):
    workdir = tmp_path / "run"
    ended = two_processes(workdir, SHARDED, flags=((), ("--config.run.log_every=5",)))
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
