"""What each scheduler would get, judged by its own schema, parser or linter."""

import copy
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from launch import jobset, sky, slurm, tpu
from launch.__main__ import SCHEDULERS, main
from launch.job import Job, LaunchError
from tests.runs import ROOT

EXAMPLES = ROOT / "launch" / "examples"
COMMAND = (
    "python",
    "-m",
    "experiments.train",
    "--config=configs/digits_mlp_dpsgd.py",
    "--workdir=runs/digits",
)
SPEC = {"name": "digits", "command": COMMAND, "directory": "/home/me/dpjax"}


def made(scheduler, **changes):
    """A job for GPUs on two machines, rendered, with options of the scheduler."""
    module, required = {
        "slurm": (slurm, {}),
        "jobset": (jobset, {"image": "registry.example/dpjax", "volume_claim": "runs"}),
        "sky": (sky, {}),
        "tpu": (
            tpu,
            {
                "project": "my-project",
                "zone": "us-central2-b",
                "runtime_version": "v2-alpha-tpuv5-lite",
            },
        ),
    }[scheduler]
    fields = Job.__dataclass_fields__
    job = Job(**(SPEC | {k: v for k, v in changes.items() if k in fields}))
    options = required | {k: v for k, v in changes.items() if k not in fields}
    return module.render(job, module.Options(**options))


GPUS = {"hosts": 2, "devices_per_process": 8, "minutes": 600}
SELECTOR = (
    "cloud.google.com/gke-tpu-accelerator=tpu-v5-lite-podslice,"
    "cloud.google.com/gke-tpu-topology=4x4"
)
EXAMPLE_CALLS = {
    "slurm.sbatch": ("slurm", GPUS | {"accelerator": "gpu:h100", "partition": "gpu"}),
    "slurm_array.sbatch": (
        "slurm",
        {
            "command": ("python", "-m", "experiments.ablate", "x.py", "--only={index}"),
            "array": "0-7%2",
            "environment": {"XLA_FLAGS": "--xla_dump_to=/tmp/my dump"},
        },
    ),
    "jobset.yaml": ("jobset", GPUS | {"accelerator": "gpu"}),
    "jobset_tpu.yaml": (
        "jobset",
        {
            "hosts": 4,
            "devices_per_process": 4,
            "accelerator": "tpu",
            "node_selector": SELECTOR,
            "namespace": "team",
        },
    ),
    "sky.yaml": ("sky", GPUS | {"accelerator": "gpu:H100", "infra": "gcp"}),
    "tpu_queued_resource.sh": (
        "tpu",
        {"hosts": 4, "accelerator": "tpu:v5litepod-16", "minutes": 600, "spot": "yes"},
    ),
}
SHELL = [name for name in EXAMPLE_CALLS if not name.endswith("yaml")]
JOBSETS = [name for name in EXAMPLE_CALLS if name.startswith("jobset")]


def example(name):
    scheduler, changes = EXAMPLE_CALLS[name]
    return made(scheduler, **changes).text


@pytest.mark.parametrize("name", EXAMPLE_CALLS)
def test_examples_are_what_is_rendered(name):
    assert example(name) == (EXAMPLES / name).read_text(), "a change: intended?"


@pytest.mark.parametrize("name", SHELL)
def test_shellcheck_finds_nothing_in_scripts(name):
    shellcheck(example(name))


def test_shellcheck_finds_nothing_in_what_each_slurm_process_runs():
    script = example("slurm.sbatch")
    shellcheck(script[script.index("bash -c '") + 9 : script.index('\' "$saved"')])


def shellcheck(script):
    done = subprocess.run(
        # SC2016: what is in single quotes is for another shell to read.
        [
            Path(sys.executable).with_name("shellcheck"),
            "--exclude=SC2016",
            "-s",
            "bash",
            "-",
        ],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck_would_find_something():
    with pytest.raises(AssertionError, match="SC2086"):
        shellcheck("a=$1\nrm $a\n")


def accepted(document):
    """Read by the types that are generated from the APIs of JobSet and Kubernetes.

    JobSet's own schema, in its CRD, is in no package. The types drop keys that they do not
    know, so what comes out must be what went in.
    """
    return JobsetV1alpha2JobSet.from_dict(document).to_dict() == document


@pytest.mark.parametrize("name", JOBSETS)
def test_jobsets_are_what_their_schema_says(name):
    assert accepted(yaml.safe_load(example(name)))


def test_a_jobset_with_a_wrong_key_or_type_is_not_accepted():
    good = yaml.safe_load(example("jobset.yaml"))
    typo, wrong = copy.deepcopy(good), copy.deepcopy(good)
    spec = "spec"
    typo[spec]["replicatedJobs"][0]["template"][spec]["paralelism"] = 2
    assert not accepted(typo)
    wrong[spec]["replicatedJobs"][0]["template"][spec]["parallelism"] = "2"
    with pytest.raises(ValueError, match="parallelism"):
        accepted(wrong)


READ_BY_SKY = """
import json, sys, sky
for text in json.load(sys.stdin):
    try:
        task = sky.Task.from_yaml_str(text)
    except Exception as error:
        print("refused:", *str(error).split())
    else:
        (resources,) = task.resources
        print(task.num_nodes, resources.accelerators)
"""


def read_by_sky(*texts):
    """What SkyPilot reads in each task, or why it refuses it."""
    python = ROOT / ".venv-sky" / "bin" / "python"
    if not python.with_name("sky").exists():
        pytest.skip("SkyPilot's own parser: see make .venv-sky/installed")
    done = subprocess.run(
        [python, "-c", READ_BY_SKY],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-len(texts) :]


def test_sky_reads_its_task(tmp_path):
    changes = EXAMPLE_CALLS["sky.yaml"][1] | {"directory": str(tmp_path)}
    text = made("sky", **changes).text
    typo = text.replace("num_nodes", "num_node")
    read, refused = read_by_sky(text, typo)
    assert read == "2 {'H100': 8}"
    assert refused.startswith("refused: ")
    assert "num_nodes" in refused


def sky_arguments(tmp_path, **changes):
    """What the command of a task gets when its shell runs ``run`` as on machine 1 of 2."""
    call = made(
        "sky", accelerator="gpu:H100", command=("printf", "%s\n", "a b"), **changes
    )
    done = subprocess.run(
        ["bash", "-c", yaml.safe_load(call.text)["run"]],
        env=os.environ
        | {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_sky_tells_each_machine_its_number_and_the_first(tmp_path):
    flags = [
        "--coordinator_address=10.0.0.1:8476",
        "--num_processes=2",
        "--process_id=1",
    ]
    assert sky_arguments(tmp_path, hosts=2, minutes=1) == ["a b", *flags]
    assert sky_arguments(tmp_path, hosts=1) == ["a b"]


def test_the_time_limit_sends_one_sigterm_and_keeps_the_status(tmp_path):
    from launch.job import limited

    script = "n=0; trap 'n=$((n+1))' TERM; sleep 0.4 & wait; wait; echo $n; exit 75"
    job = Job(**(SPEC | {"minutes": 1}))
    words = limited(job, f'bash -c "{script}"'.replace("$", "\\$"))
    words = words.replace(" 1m ", " 0.2s ")
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, "1\n")


STUB = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$LOG"
case "$*" in
  *describe*) sed -n "$(grep -c describe "$LOG")p" <<< "$STATES" ;;
  *"$FAIL"*) exit 1 ;;
esac
"""


def repository(folder, *, uncommitted=False):
    """A repository with one commit, of which a config is perhaps no part."""
    git = ["git", "-C", folder, "-c", "user.name=me", "-c", "user.email=me@example.org"]
    if not folder.exists():
        folder.mkdir()
        subprocess.run([*git, "init", "--quiet"], check=True)
        commit = ["commit", "--quiet", "--allow-empty", "--message=all"]
        subprocess.run([*git, *commit], check=True)
    if uncommitted:
        (folder / "mine.py").write_text("x = 1")
    return folder


def tpu_calls(tmp_path, *, states="ACTIVE", fail="nothing"):
    """Run the TPU script on a stand-in for gcloud; return status and calls."""
    stub = tmp_path / "gcloud"
    stub.write_text(STUB)
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "log").write_text("")
    changes = {"directory": str(repository(tmp_path / "repository"))}
    call = made("tpu", **(EXAMPLE_CALLS["tpu_queued_resource.sh"][1] | changes))
    script = tmp_path / call.file
    script.write_text(call.text)
    done = subprocess.run(
        [*call.argv, script],
        env=os.environ
        | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "LOG": str(tmp_path / "log"),
            "STATES": states,
            "FAIL": fail,
            "POLL_SECONDS": "0",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, (tmp_path / "log").read_text(), done.stderr


def verbs(log):
    words = ("create", "describe", "scp --worker=all", "ssh", "scp --recurse", "delete")
    found = [next((w for w in words if f" {w}" in li), "") for li in log.splitlines()]
    return [word for word in found if word]


def test_a_tpu_is_waited_for_used_and_given_back(tmp_path):
    status, log, _ = tpu_calls(tmp_path, states="WAITING_FOR_RESOURCES\nACTIVE")
    assert status == 0
    wanted = ["create", "describe", "describe", "scp --worker=all", "ssh", "ssh"]
    assert verbs(log) == [*wanted, "scp --recurse", "delete"]


def test_a_tpu_whose_job_failed_is_kept_with_its_checkpoints(tmp_path):
    status, log, _ = tpu_calls(tmp_path, fail="experiments.train")
    assert status == 1
    assert verbs(log)[-1] == "ssh"


def test_what_is_not_committed_is_not_left_behind_in_silence(tmp_path):
    repository(tmp_path / "repository", uncommitted=True)
    status, log, error = tpu_calls(tmp_path)
    assert (status, log) == (2, "")  # nothing was asked for
    assert "changes that are not committed" in error
    assert "mine.py" in error


def test_a_tpu_that_cannot_be_had_ends_the_script(tmp_path):
    status, log, _ = tpu_calls(tmp_path, states="FAILED")
    assert status == 1
    assert verbs(log) == ["create", "describe"]


def on_a_tpu_vm(workers, **changes):
    """Run what the second machine of a TPU runs, with a stand-in for its metadata."""
    call = made("tpu", command=("printf", "<%s>", "$x"), **changes)
    script = call.text[call.text.index("\ncommand=") : call.text.index("\nset -euo")]
    show = ["bash", "-c", f'{script}\nprintf "%s" "$command"']
    remote = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    shellcheck(remote)
    curl = f"""curl() {{ case "$*" in *number) echo 1 ;; *) echo "{workers}" ;; esac; }}
    cd() {{ :; }}
    """
    return subprocess.run(
        ["bash", "-c", curl + remote], capture_output=True, text=True, check=False
    )


def test_what_a_tpu_vm_runs_passes_shellcheck_and_finds_its_number():
    done = on_a_tpu_vm("a:0:10.1,b:1:10.2", hosts=2, accelerator="tpu:v4-16")
    flags = ["--coordinator_address=10.1:8476", "--num_processes=2", "--process_id=1"]
    assert done.stdout == "".join(f"<{word}>" for word in ["$x", *flags])
    assert on_a_tpu_vm("a:0:10.1", accelerator="tpu:v4-8").stdout == "<$x>"


def test_machines_of_a_tpu_that_would_not_know_of_each_other_do_not_start():
    done = on_a_tpu_vm("a:0:10.1,b:1:10.2", accelerator="tpu:v9-2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: hosts=1, and this TPU has 2 workers\n"


@pytest.mark.parametrize(
    ("model", "workers"),
    [
        ("v2-8", 1),
        ("v3-32", 4),
        ("v4-16", 2),
        ("v5p-8", 1),
        ("v5litepod-8", 1),
        ("v5litepod-16", 4),
        ("v6e-1", 1),
        ("v6e-32", 8),
    ],
)
def test_a_tpu_needs_a_process_on_each_of_its_machines(model, workers):
    made("tpu", hosts=workers, accelerator=f"tpu:{model}")
    with pytest.raises(
        LaunchError, match=f"{model} has {workers} workers; use --hosts"
    ):
        made("tpu", hosts=workers + 1, accelerator=f"tpu:{model}")


@pytest.mark.parametrize(
    ("changes", "installed"),
    [
        ({"accelerator": "cpu"}, "make .venv/installed"),
        ({"accelerator": "gpu:H100"}, "'jax[cuda13]'"),
        ({"accelerator": "gpu:H100", "setup": "true"}, "true"),
    ],
)
def test_sky_installs_jax_for_the_accelerator(changes, installed):
    assert yaml.safe_load(made("sky", **changes).text)["setup"].endswith(installed)


def test_words_of_a_command_reach_slurm_as_they_were_written():
    odd = ("printf", "<%s>", "a b", "it's", "$HOME", "x{index}y {index}", "{}")
    text = made("slurm", command=odd, array="3").text
    line = next(li for li in text.splitlines() if li.startswith('\' "$saved" '))
    words = line.removeprefix('\' "$saved" ')
    done = subprocess.run(
        ["bash", "-c", words],
        env=os.environ | {"SLURM_ARRAY_TASK_ID": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "<a b><it's><$HOME><x3y 3><{}>"


def test_words_of_a_command_reach_kubernetes_as_they_were_written():
    text = made("jobset", command=("echo", "$(date)", "$$", "$HOME")).text
    job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    # $$ is read as $, and $(NAME) is looked up; nothing else is special.
    assert container["command"] == ["echo", "$$(date)", "$$$$", "$$HOME"]


def test_gpus_of_slurm_processes_are_all_used():
    one = made("slurm", accelerator="gpu", devices_per_process=4).text
    assert "--gres=gpu:4" in one
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3" in one
    each = made("slurm", accelerator="gpu:a100", processes_per_host=4).text
    assert "--gres=gpu:a100:4" in each
    assert "JAX_LOCAL_DEVICE_IDS" not in each


def run(capsys, *argv):
    status = main([*argv])
    out, err = capsys.readouterr()
    return status, out, err


def test_dry_run_prints_the_file_and_the_command_that_gets_it(capsys):
    status, out, _ = run(
        capsys, "slurm", "--name=a", "--directory=/x", "--dry_run", "--", "true"
    )
    call = slurm.render(
        Job(name="a", command=("true",), directory="/x"), slurm.Options()
    )
    assert status == 0
    assert (
        out == f"cat > a.sbatch <<'END'\n{call.text}END\nsbatch --parsable a.sbatch\n"
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_help_names_every_option(scheduler, capsys):
    status, out, _ = run(capsys, scheduler, "--help")
    assert status == 0
    for name in SCHEDULERS[scheduler].Options.__dataclass_fields__:
        assert f"{name}: " in out


S = ("slurm", "--name=a", "--directory=/x")
K = ("jobset", "--name=a", "--directory=/x", "--image=i", "--volume_claim=v")
T = ("tpu", "--name=a", "--project=p", "--zone=z", "--runtime_version=r")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("slurmm",), "scheduler='slurmm' is unknown; did you mean 'slurm'?"),
        (("slurm", "--nmae=a"), "--nmae=a is unknown; did you mean 'name'?"),
        (("slurm", "name=a"), "name=a is unknown"),
        (("slurm", "--name"), "--name has no value"),
        (("slurm",), "--name=... is missing"),
        (("jobset", "--name=a"), "--image=... is missing"),
        ((*S, "--hosts=two"), "hosts='two' must be a whole number"),
        ((*S, "--hosts=0"), "hosts=0 must be at least 1"),
        ((*S, "--minutes=-1"), "minutes=-1 must be at least 1"),
        ((*S, "--name=A_b"), "name='A_b' must be at most 40 lower-case letters"),
        ((*S, "--env=1A=x"), "env='1A' is not the name of a variable"),
        ((*S, "--accelerator=gpus"), "accelerator='gpus' must be cpu, gpu"),
        ((*S, "--accelerator=cpu:x"), "cpu has no model"),
        ((*S, "--directory=."), "directory='.' must be absolute"),
        ((*S, "--accelerator=tpu:x"), "accelerator='tpu:x': slurm takes cpu or gpu"),
        (
            (
                *S,
                "--accelerator=gpu",
                "--processes_per_host=2",
                "--devices_per_process=2",
            ),
            "take one process per host, or one device per process",
        ),
        ((*S, "--array=0-3"), "array='0-3', but the command has no {index}"),
        ((*S, "--array=x"), "array='x' must be as in 0-3,7"),
        (
            (*K, "--accelerator=gpu:h100"),
            "accelerator='gpu:h100': jobset takes gpu, no model",
        ),
        ((*K, "--directory=x"), "directory='x' must be absolute in the image"),
        ((*K, "--node_selector=a"), "node_selector='a' must be as in KEY=VALUE"),
        (("sky", "--name=a", "--processes_per_host=2"), "sky takes at most 1"),
        (("sky", "--name=a", "--accelerator=gpu"), "sky needs a model"),
        (T, "accelerator='cpu': tpu takes tpu"),
        (
            (*T, "--accelerator=tpu:v5litepod-16"),
            "hosts=1: tpu:v5litepod-16 has 4 work",
        ),
        ((*T, "--accelerator=tpu"), "a type is missing, as in tpu:v5litepod-16"),
        (("local", "--name=a", "--hosts=2"), "hosts=2: local takes at most 1"),
        (("local", "--name=a", "--port=x"), "port='x' must be a whole number"),
        (("local", "--name=a", "--port=65536"), "port=65536 must be from 1 to 65535"),
    ],
)
def test_what_cannot_be_started_is_answered_in_one_line(argv, message, capsys):
    status, out, err = run(capsys, *argv, "--", "true")
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_command_is_needed(capsys):
    assert "command=() is empty" in run(capsys, *S)[2]
    assert "command=() is empty" in run(capsys, *S, "--")[2]


def test_an_index_without_an_array_is_refused(capsys):
    assert "the command has {index}" in run(capsys, *S, "--", "echo", "{index}")[2]


@pytest.mark.parametrize("indices", [[], [-1], [2, 2]])
def test_indices_of_a_sweep_are_checked(indices):
    job = Job(**(SPEC | {"command": ("echo", "{index}")}))
    with pytest.raises(LaunchError, match="must be some numbers >= 0, all different"):
        slurm.submit_array(job, slurm.Options(), indices)


def test_a_tool_that_is_missing_or_fails_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch is not installed here; --dry_run" in run(capsys, *S, "--", "true")[2]
    tool = tmp_path / "sbatch"
    tool.write_text("#!/bin/sh\necho 'no such partition' >&2\nexit 3\n")
    tool.chmod(0o755)
    assert "sbatch failed (3)" in run(capsys, *S, "--", "true")[2]
    with pytest.raises(LaunchError, match=r"sbatch failed \(3\): no such partition"):
        slurm.submit(Job(**SPEC), slurm.Options())


def test_submit_returns_the_id_without_the_cluster(tmp_path, monkeypatch):
    tool = tmp_path / "sbatch"
    tool.write_text("#!/bin/sh\necho '17;big'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.submit(Job(**SPEC), slurm.Options()) == "17"
