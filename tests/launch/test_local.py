"""Many processes on this host: they start and end together."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import local
from launch.__main__ import main
from launch.job import Job, LaunchError
from tests.runs import ROOT


def job(script, *, processes=2, **changes):
    """Run by bash, with the number of the process as $1."""
    flag = "${@: -1}"
    command = ("bash", "-c", f'set -- "{flag}"; set -- "${{1##*=}}"; {script}', "run")
    return Job(name="job", command=command, processes_per_host=processes, **changes)


def run(script, **changes):
    return local.run(job(script, **changes), local.Options())


def test_processes_find_each_other_and_have_their_devices(capfd):
    command = (sys.executable, "-m", "tests.launch.peers")
    spec = Job(name="job", command=command, processes_per_host=2, devices_per_process=3)
    assert local.run(spec, local.Options()) == 0
    said = capfd.readouterr().out
    for index in range(2):
        assert f"[{index}] process {index} of 2, 3 devices: 3\n" in said


def test_a_single_process_gets_no_flags(capfd):
    assert run('echo "$@"', processes=1) == 0
    assert capfd.readouterr().out == "[0] run\n"


def test_both_outputs_of_each_process_are_passed_on_by_line(capfd):
    assert run("echo out $1; echo err >&2; printf tail") == 0
    lines = sorted(capfd.readouterr().out.replace("tail", "tail\n").split("\n"))
    expected = [f"[{i}] {w}" for i in range(2) for w in ("err", f"out {i}", "tail")]
    assert [line for line in lines if line] == expected


def test_the_environment_is_set(capfd):
    spec = {"environment": {"GREETING": "good day"}, "devices_per_process": 4}
    assert run('echo "$GREETING" $JAX_NUM_CPU_DEVICES $JAX_PLATFORMS', **spec) == 0
    assert "[1] good day 4 cpu\n" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("end", "status"), [("exit 3", 3), ("kill -9 $$", 128 + 9), ("kill -ABRT $$", 134)]
)
def test_when_one_process_dies_all_end_with_its_status(end, status):
    start = time.monotonic()
    assert run(f"(($1)) || sleep 100; {end}") == status
    assert time.monotonic() - start < 50


def test_what_ignores_sigterm_is_killed_with_its_children(monkeypatch, tmp_path):
    monkeypatch.setattr(local, "_BEREAVED_SECONDS", 0.2)
    note = tmp_path / "child"
    stubborn = f"trap '' TERM; sleep 100 & echo $! > {note}; wait; wait; sleep 100"
    die = f"while [[ ! -s {note} ]]; do sleep 0.05; done; exit 1"
    assert run(f"if (($1)); then {die}; else {stubborn}; fi") == 1
    child = int(note.read_text())
    while alive(child):
        time.sleep(0.05)


def alive(pid):
    """Whether a process runs; one that has ended may still wait to be collected."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_the_others_may_finish_saving_when_one_has_saved(capfd):
    saving = "trap 'echo told' TERM; (($1)) && sleep 0.5; echo saved; exit 75"
    assert run(saving) == 75
    said = capfd.readouterr().out
    assert said.count("saved") == 2
    assert "told" not in said


def test_an_early_end_without_error_stops_no_other(capfd):
    assert run("(($1)) && sleep 0.3; echo done") == 0
    assert capfd.readouterr().out.count("done") == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_process_once(number):
    script = (
        "n=0; trap 'n=$((n+1))' TERM INT; echo ready; sleep 0.6 & wait; wait; "
        "echo told $n; exit 75"
    )
    spec = job(script)
    argv = ["local", "--name=job", "--processes_per_host=2", "--", *spec.command]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines = [process.stdout.readline() for _ in range(2)]
    assert sorted(lines) == ["[0] ready\n", "[1] ready\n"]
    os.killpg(process.pid, number)  # like Ctrl-C in a terminal
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert sorted(said.splitlines()) == ["[0] told 1", "[1] told 1"]


def test_the_time_limit_is_a_sigterm(monkeypatch, capfd):
    script = "trap 'echo told; exit 75' TERM; sleep 100 & wait"
    spec = job(script, minutes=1)
    object.__setattr__(spec, "minutes", 0.01)
    assert local.run(spec, local.Options()) == 75
    assert capfd.readouterr().out.count("told") == 2


def test_an_occupied_port_is_an_error_and_nothing_starts(tmp_path, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        argv = ["local", "--name=job", f"--port={port}", "--processes_per_host=2"]
        assert main([*argv, "--", "touch", str(tmp_path / "started")]) == 2
    assert f"error: port={port} cannot be used (Address" in capsys.readouterr().err
    assert not (tmp_path / "started").exists()


def test_a_command_that_does_not_exist_is_an_error():
    spec = Job(name="job", command=("no-such-program",))
    with pytest.raises(
        LaunchError, match="command='no-such-program' cannot be started"
    ):
        local.run(spec, local.Options())


def test_gpus_are_shared_out():
    spec = Job(
        name="job",
        command=("true",),
        processes_per_host=2,
        devices_per_process=2,
        accelerator="gpu",
    )
    shown = local.show(spec, local.Options()).splitlines()
    assert shown[0].startswith("CUDA_VISIBLE_DEVICES=0,1 true --coordinator_address=")
    assert shown[1].startswith("CUDA_VISIBLE_DEVICES=2,3 true --coordinator_address=")
    assert shown[1].endswith("--num_processes=2 --process_id=1 &")
