import io
import json
import math
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dpjax.privacy.sensitive import PerExample
from dpjax.training.metrics import (
    JsonlWriter,
    Progress,
    TensorBoardWriter,
    WandbWriter,
    plain_scalars,
    read_jsonl,
    writers,
)


def test_imports_without_jax_or_any_writer_library():
    heavy = ["jax", "numpy", "rich", "tensorboardX", "wandb"]
    found = f"[m for m in {heavy} if m in sys.modules]"
    code = f"import sys, dpjax.training.metrics; print({found})"
    command = [sys.executable, "-W", "error", "-c", code]
    assert subprocess.check_output(command, text=True).strip() == "[]"


def write_steps(path, steps, **options):
    writer = JsonlWriter(path, **options)
    for step in steps:
        writer.write(step, {"epsilon": step / 10})
    writer.close()


def test_jsonl_round_trip_is_strict_json(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    scalars = {
        "epsilon": 0.1,
        "count": 3,
        "phase": "diff\nε",
        "nan": math.nan,
        "inf": math.inf,
        "-inf": -math.inf,
    }
    writer = JsonlWriter(path)
    writer.write(1, scalars)
    # Flushed: readable while the run goes on, by any strict reader.
    (line,) = path.read_text().splitlines()
    writer.close()

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(line, parse_constant=refuse)["nan"] == "NaN"
    (record,) = read_jsonl(path)
    assert math.isnan(record.pop("nan"))
    del scalars["nan"]
    assert record == {"step": 1, **scalars}


def test_jsonl_resume_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 7))
    write_steps(path, [5, 6, 7], resume_step=4)
    assert [r["step"] for r in read_jsonl(path)] == [1, 2, 3, 4, 5, 6, 7]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_jsonl_without_resume_starts_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    write_steps(path, [1])
    assert [r["step"] for r in read_jsonl(path)] == [1]


@pytest.mark.parametrize("torn", ['{"step": 3, "eps', "{", "3", "\x00\x00"])
def test_jsonl_resume_drops_a_torn_last_line(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    with path.open("a") as file:
        file.write(torn)
    assert [r["step"] for r in read_jsonl(path)] == [1, 2]
    write_steps(path, [3], resume_step=2)
    assert [r["step"] for r in read_jsonl(path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["{", "[1]", '{"epsilon": 1.0}', '{"step": "x"}', ""])
def test_jsonl_damage_elsewhere_is_an_error_with_its_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not a record"):
        read_jsonl(path)
    before = path.read_text()
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not a record"):
        JsonlWriter(path, resume_step=3)
    assert path.read_text() == before


def test_jsonl_reserves_step(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match='"step" is taken'):
        writer.write(1, {"step": 2.0})
    writer.close()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.5, 1.5),
        (2, 2),
        ("text", "text"),
        (np.float32(0.5), 0.5),
        (np.array(7), 7),
        (jnp.float32(0.25), 0.25),
        (jnp.asarray(0.5, ml_dtypes.bfloat16), 0.5),
    ],
)
def test_plain_scalars_become_python_values(value, expected):
    found = plain_scalars({"x": value})["x"]
    assert found == expected
    assert json.loads(json.dumps(found)) == expected


@pytest.mark.parametrize(
    "value",
    [
        PerExample(*np.zeros((4, 8))),
        np.zeros(1),
        jnp.zeros(3),
        [1.0],
        None,
        1j,
        np.array(None),
        jax.random.key(0),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("kind", ["jsonl", "tensorboard", "wandb", "all", "progress"])
def test_every_writer_refuses_what_is_not_a_plain_scalar(
    tmp_path, fake_wandb, kind, value
):
    make = {
        "jsonl": lambda: JsonlWriter(tmp_path / "metrics.jsonl"),
        "tensorboard": lambda: TensorBoardWriter(tmp_path),
        "wandb": lambda: WandbWriter(tmp_path),
        "all": lambda: writers(["tensorboard"], tmp_path),
        "progress": lambda: Progress(10),
    }
    writer = make[kind]()
    write = writer.update if kind == "progress" else writer.write
    message = r"^norms=.* private; reveal it explicitly with run.log_sensitive=True"
    with pytest.raises(TypeError, match=message):
        write(1, {"epsilon": 1.0, "norms": value})
    if kind in ("jsonl", "all"):
        assert read_jsonl(tmp_path / "metrics.jsonl") == []
    if kind != "progress":
        writer.close()
    assert fake_wandb.calls in ([], [("finish",)])


@pytest.fixture
def fake_wandb(monkeypatch):
    """Stands in for wandb, and records the calls that matter."""
    module = types.ModuleType("wandb")
    module.calls = []
    module.init_arguments = None

    class Run:
        def log(self, scalars, *, step):
            module.calls.append(("log", step, scalars))

        def finish(self):
            module.calls.append(("finish",))

    def init(**arguments):
        module.init_arguments = arguments
        return Run()

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_scalars_and_step(tmp_path, fake_wandb):
    with writers(["wandb"], tmp_path) as writer:
        writer.write(3, {"epsilon": np.float32(0.5)})
    assert fake_wandb.init_arguments == {"project": "dpjax", "dir": str(tmp_path)}
    assert fake_wandb.calls == [("log", 3, {"epsilon": 0.5}), ("finish",)]
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 3, "epsilon": 0.5}]


def tensorboard_events(directory):
    from tensorboardX.proto.event_pb2 import Event

    (file,) = directory.glob("events.out.tfevents.*")
    content, events = file.read_bytes(), []
    while content:  # length (8 bytes), checksum (4), event, checksum (4)
        length = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def test_tensorboard_files_hold_the_values(tmp_path):
    with writers(["tensorboard"], tmp_path) as writer:
        writer.write(3, {"epsilon": 0.5, "phase": "diff"})
    found = {
        value.tag: (event.step, value)
        for event in tensorboard_events(tmp_path)
        for value in event.summary.value
    }
    step, value = found["epsilon"]
    assert (step, value.simple_value) == (3, 0.5)
    assert found["phase/text_summary"][1].tensor.string_val == [b"diff"]
    # When a step ended tells how many examples were drawn.
    times = [e.wall_time for e in tensorboard_events(tmp_path) if e.summary.value]
    assert times == [3, 3]


def test_tensorboard_resume_hides_what_will_be_written_again(tmp_path):
    from tensorboardX.proto.event_pb2 import SessionLog

    writers(["tensorboard"], tmp_path, resume_step=4).close()
    starts = [
        event.step
        for event in tensorboard_events(tmp_path)
        if event.session_log.status == SessionLog.START
    ]
    assert starts == [5]  # readers drop earlier events from this step on


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")]
)
def test_a_missing_package_is_one_line_with_the_fix(
    tmp_path, monkeypatch, name, package
):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"^{package} is not installed: pip install 'dpjax\[{name}\]'$"
    with pytest.raises(ImportError, match=message):
        writers([name], tmp_path)


def test_a_broken_package_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("import a_dependency_of_wandb")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ModuleNotFoundError, match="a_dependency_of_wandb"):
        writers(["wandb"], tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tensorbord", "did you mean 'tensorboard'"),
        ("mlflow", "use any of tensorboard, wandb"),
    ],
)
def test_an_unknown_writer_is_an_error_with_valid_names(tmp_path, name, hint):
    with pytest.raises(ValueError, match=f"unknown writer '{name}': {hint}"):
        writers([name], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_writers_resume(tmp_path):
    write_steps(tmp_path / "metrics.jsonl", range(1, 7))
    with writers([], tmp_path, resume_step=4) as writer:
        writer.write(5, {"epsilon": 1.0})
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_progress_prints_plain_lines(capsys, monkeypatch):
    seconds = iter([0.0, 100.0, 110.0, 3000.0])
    monkeypatch.setattr("dpjax.training.metrics.time.monotonic", lambda: next(seconds))
    with Progress(400, start=100) as progress:
        progress.update(110, {"loss": 0.123456, "phase": "diff"})
        progress.update(
            120, {"examples/s": 15321.4, "test/accuracy": 0.9, "epsilon": 1.4213}
        )
        progress.update(130, {})
    assert capsys.readouterr().err.splitlines() == [
        "goes on from step 100 of 400",
        "step 110/400  eta 48:20  elapsed 1:40  loss 0.1235  phase diff",
        # The first steps are not counted: they took 100 s, the others 10 s.
        "step 120/400  epsilon 1.421  test/accuracy 0.9  eta 4:40  elapsed 1:50  "
        "examples/s 15321",
        "step 130/400  eta 10:52:30  elapsed 50:00",
    ]


def test_a_new_run_does_not_say_that_it_goes_on(capsys):
    with Progress(400):
        pass
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal_of_80_columns(monkeypatch):
    # No fixture: pytest sets sys.stderr anew between a fixture and its test.
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    return terminal


def test_progress_is_one_live_line_on_a_terminal(monkeypatch):
    terminal = terminal_of_80_columns(monkeypatch)
    with Progress(400) as progress:
        progress.update(120, {"epsilon": 1.5})
        progress.update(400, {"epsilon": 1.75, "loss[/red]": 3.0})
    shown = terminal.getvalue()
    assert "step 400/400  epsilon 1.75  eta 0:00  elapsed 0:00  loss[/red] 3" in shown
    assert "\x1b[" in shown  # drawn in place


def test_a_terminal_of_80_columns_shows_the_last_score(monkeypatch):
    terminal = terminal_of_80_columns(monkeypatch)
    scalars = {"examples/s": 123456.7, "epsilon": 2.998, "update_norm": 0.0312}
    with Progress(40000, start=45) as progress:
        progress.update(12000, scalars | {"private_test/accuracy": 0.9531})
        progress.update(13000, scalars | {"epsilon": 2.999})
    shown = terminal.getvalue()
    assert "goes on from step 45 of 40000" in shown
    last = shown.rpartition("step 13000/40000")[2]
    assert last.startswith("  epsilon 2.999  private_test/accuracy 0.9531  eta ")


def test_packages_that_import_lazily_do_not_end_the_live_line(monkeypatch):
    from etils import epy

    terminal = terminal_of_80_columns(monkeypatch)
    died = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    with Progress(400) as progress:
        with epy.lazy_imports():
            time.sleep(0.4)  # rich's own thread would draw some four times
        progress.update(120, {"epsilon": 1.5})
    assert died == []
    assert "step 120/400" in terminal.getvalue()
