"""The loop: what a run leaves behind, and that a resumed run is the same run."""

import dataclasses
import gc
import hashlib
import json
import math
import operator
import shutil
import signal
import time

import jax
import numpy as np
import pytest

import dpjax
from dpjax.data.batches import batches
from dpjax.privacy.noise import root_key
from dpjax.training import checkpoint, report
from dpjax.training import metrics as metric_writers
from dpjax.training.checkpoint import CheckpointError
from dpjax.training.config import ConfigError
from dpjax.training.experiment import build_experiment
from dpjax.training.ledger import Ledger, NoiseReuseError
from dpjax.training.state import init_state, sampling_seed
from dpjax.training.step import _moving_average, make_train_step
from dpjax.training.train import Interrupted, train
from dpjax.transforms import private
from experiments.train import main
from tests.checks import thinned
from tests.runs import (
    assert_same_export,
    card,
    command,
    crash_after,
    exported,
    metrics,
    tiny,
)

metrics_of = metrics

pytestmark = pytest.mark.usefixtures("shared_steps")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """One whole run of 12 steps with seed 1, to compare with."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    train(tiny(), workdir)
    return workdir


def test_a_run_leaves_metrics_card_export_and_checkpoints(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {
        "checkpoints",
        "config.json",
        "export",
        "ledger.txt",
        "metrics.jsonl",
        "privacy_card.json",
        "privacy_card.md",
    }
    assert {p.name for p in (undisturbed / "export").iterdir()} == {
        "parameters.json",
        "params.npz",
        "privacy_card.json",
        "privacy_card.md",
    }
    assert len((undisturbed / "ledger.txt").read_text().splitlines()) == 12


def test_the_resolved_config_is_kept_with_the_run(undisturbed):
    kept = json.loads((undisturbed / "config.json").read_text())
    resolved = kept.pop("resolved")
    assert kept == json.loads(json.dumps(tiny()))
    assert resolved["mechanism"]["noise_multiplier"] == 4.0
    assert resolved["mechanism"]["num_examples"] == 1437


def test_metrics_hold_public_values_only(undisturbed):
    records = metrics(undisturbed)
    assert [r["step"] for r in records] == [4, 6, 8, 12]
    public = {"step", "epsilon", "update_norm", "clip_norm"}
    public |= {"test/accuracy"}
    assert set().union(*records) == public
    epsilons = [r["epsilon"] for r in records]
    assert epsilons == sorted(epsilons)


def test_what_is_told_of_a_run_is_measured_on_the_held_out_data(undisturbed):
    experiment = build_experiment(tiny())
    told = metrics(undisturbed)[-1]["test/accuracy"]
    params = jax.tree.map(jax.numpy.asarray, exported(undisturbed))
    mean = {}
    for name in ("held_out", "source"):
        data = getattr(experiment, name)
        values = jax.vmap(experiment.metric, in_axes=(None, 0))(
            params, data[list(range(len(data)))]
        )
        mean[name] = float(values.mean())
    assert told == pytest.approx(mean["held_out"], abs=1e-6)
    assert mean["source"] != pytest.approx(mean["held_out"], abs=1e-3)


def test_progress_tells_the_learning_rate_of_a_step(tmp_path, capsys):
    schedule = {
        "name": "optax:linear_schedule",
        "init_value": 0.5,
        "end_value": 0.0,
        "transition_steps": 2,
    }
    changes = {"optimizer.learning_rate": schedule, "run.log_every": 1}
    train(tiny(**changes, **{"mechanism.steps": 2}), tmp_path)
    lines = [s for s in capsys.readouterr().err.splitlines() if s.startswith("step")]
    assert [line.rpartition("lr ")[2] for line in lines] == ["0.5", "0.25"]


def test_throughput_leaves_out_the_time_of_the_accountant(tmp_path, monkeypatch):
    now = [0.0]

    def tick():
        now[0] += 1e-6
        return now[0]

    def slow(*args, **options):
        now[0] += 1000
        return real(*args, **options)

    real = report.card_of
    monkeypatch.setattr(report, "card_of", slow)
    monkeypatch.setattr(time, "perf_counter", tick)
    changes = {"mechanism.steps": 3, "run.log_every": 1, "run.eval_every": 1}
    train(tiny(**changes | {"run.log_sensitive": True}), tmp_path)
    # 143.7 examples are expected in a step.
    assert min(r["sensitive/examples/s"] for r in metrics(tmp_path)) > 1000


def test_between_evaluations_more_is_accounted_than_was_released(tmp_path, monkeypatch):
    """A line of the log costs no accounting of its own, and never tells too little."""
    told = []

    def telling(config, mechanism, steps, *about):
        told.append(steps)
        return real(config, mechanism, steps, *about)

    real = report.card_of
    monkeypatch.setattr(report, "card_of", telling)
    changes = {"mechanism.steps": 7, "run.log_every": 1, "run.eval_every": 3}
    config = tiny(**changes | {"run.checkpoint_every": 5})
    train(config, tmp_path)
    assert told[-5:] == [3, 5, 6, 7, 7]
    plan = build_experiment(config).mechanism
    at = [3, 3, 3, 5, 5, 6, 7]
    assert [r["epsilon"] for r in metrics(tmp_path)] == [
        dpjax.epsilon(plan, steps=steps) for steps in at
    ]


def test_the_card_tells_the_epsilon_of_the_steps_taken(undisturbed):
    found = card(undisturbed)
    plan = dpjax.DpSgd(
        clip_norm=1.0,
        clip_style="flat",
        noise_multiplier=4.0,
        sampling=dpjax.Poisson(rate=0.1),
        steps=12,
        num_examples=1437,
        delta=1e-5,
    )
    assert found["epsilon"] == pytest.approx(dpjax.epsilon(plan), abs=1e-9)
    assert found["steps_taken"] == 12
    assert metrics(undisturbed)[-1]["epsilon"] == pytest.approx(found["epsilon"])


def test_the_card_names_the_file_of_parameters_it_goes_with(undisturbed):
    found = card(undisturbed)["about"]["parameters"]
    file = (undisturbed / "export" / "params.npz").read_bytes()
    assert found == hashlib.sha256(file).hexdigest()
    for name in ("privacy_card.json", "privacy_card.md"):
        exported_too = (undisturbed / "export" / name).read_text()
        assert exported_too == (undisturbed / name).read_text()


def test_one_program_for_fifty_poisson_batches_of_all_sizes(tmp_path):
    config = tiny(**{"mechanism.steps": 50, "compute.physical_batch_size": 32})
    experiment = build_experiment(config)
    mechanism = experiment.mechanism
    transform = private(mechanism, experiment.optimizer, noise_key=root_key(1))
    state = init_state(config, experiment, transform)
    step = make_train_step(config, experiment, transform)
    chunks, sizes = set(), set()
    for batch in batches(
        experiment.source,
        mechanism,
        seed=sampling_seed(state),
        physical_batch_size=32,
    ):
        state, _, _ = step(state, batch)
        chunks.add(len(batch.chunks))
        sizes.add(sum(int(chunk.mask.sum()) for chunk in batch.chunks))
    assert len(sizes) > 15
    assert len(chunks) > 2
    assert int(state.private.step) == 50
    for function in (step.begin, step.accumulate, step.finish):
        assert function._cache_size() == 1
    assert int(state.private.step) == 50


def test_an_empty_poisson_batch_is_a_release_of_noise_alone(tmp_path):
    config = tiny(
        **{"mechanism.sampling": {"name": "dpjax.privacy:Poisson", "rate": 1e-6}}
    )
    state = train(config, tmp_path)
    assert int(state.private.step) == 12
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize("steps", thinned([(s,) for s in (0, 1, 4, 5, 9, 11)], 2))
def test_resume_after_a_crash_is_bitwise_the_undisturbed_run(
    steps, tmp_path, undisturbed, monkeypatch
):
    with monkeypatch.context() as patch:
        crash_after(patch, steps)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path)
    train(tiny(), tmp_path)
    assert_same_export(tmp_path, undisturbed)
    ours, theirs = metrics(tmp_path), metrics(undisturbed)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == other
    ledgers = [(path / "ledger.txt").read_text() for path in (tmp_path, undisturbed)]
    assert ledgers[0] == ledgers[1]


def test_resume_after_kill_9_is_bitwise_the_undisturbed_run(tmp_path):
    config = {"mechanism.steps": 24, "run.log_every": 1, "run.checkpoint_every": 5}
    flags = [f"--config.{key}={value}" for key, value in config.items()]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    for kill_at in (2, 13):
        process = command(
            "--config=tests/tiny_config.py", *flags, f"--workdir={broken}"
        )
        while process.poll() is None and last_step(broken) < kill_at:
            time.sleep(0.01)
        assert process.poll() is None, process.stdout.read()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert last_step(broken) < 24
    train(tiny(**config), broken)
    train(tiny(**config), whole)
    assert_same_export(broken, whole)


def last_step(workdir):
    try:
        records = metrics(workdir)
    except (FileNotFoundError, ValueError):
        return 0
    return records[-1]["step"] if records else 0


def test_sigterm_saves_exits_75_and_the_run_goes_on(tmp_path):
    config = {"mechanism.steps": 40, "run.log_every": 1, "run.checkpoint_every": 1000}
    flags = [f"--config.{key}={value}" for key, value in config.items()]
    arguments = ["--config=tests/tiny_config.py", *flags, f"--workdir={tmp_path}"]
    process = command(*arguments)
    while process.poll() is None and last_step(tmp_path) < 5:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 75, output
    assert "run the same command to go on" in output
    saved = card(tmp_path)["steps_taken"]
    assert 5 <= saved < 40
    assert (tmp_path / "checkpoints" / str(saved)).is_dir()
    assert not (tmp_path / "export").exists()
    train(tiny(**config), tmp_path)
    steps = [record["step"] for record in metrics(tmp_path)]
    assert steps == list(range(1, 41))


def test_sigterm_outside_of_the_steps_exits_75(tmp_path, monkeypatch, capsys):
    def told(config, workdir):
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("dpjax.training.train.train", told)
    with pytest.raises(SystemExit) as left:
        main(["--config=tests/tiny_config.py", f"--workdir={tmp_path}"])
    assert left.value.code == 75
    assert "run the same command to go on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_export_that_lost_its_parameters_is_not_called_whole(tmp_path, capsys):
    command = ["--config=tests/tiny_config.py", f"--workdir={tmp_path}"]
    assert main(command) == 0
    parameters = tmp_path / "export" / "params.npz"
    whole = parameters.read_bytes()
    parameters.unlink()
    assert main(command) == 2
    assert "export exists: remove it" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "export")
    assert main(command) == 0
    assert parameters.read_bytes() == whole


# Orbax leaves callbacks behind on a closed event loop when a load fails, and reads that
# complain when they are collected. Tests that use this collect them, lest a later test
# be blamed.
orbax_debris = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@orbax_debris
def test_a_corrupt_checkpoint_costs_steps_but_changes_nothing(
    tmp_path, undisturbed, monkeypatch
):
    with monkeypatch.context() as patch:
        crash_after(patch, 10)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path)
    flip_bits(tmp_path / "checkpoints" / "8")
    train(tiny(), tmp_path)
    assert_same_export(tmp_path, undisturbed)
    assert any((tmp_path / "checkpoints").glob("corrupt-8-*"))
    gc.collect()


@orbax_debris
def test_with_every_checkpoint_corrupt_nothing_starts_afresh(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        crash_after(patch, 10)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path)
    for step in ("4", "8"):
        flip_bits(tmp_path / "checkpoints" / step)
    before = (tmp_path / "ledger.txt").read_text()
    with pytest.raises(CheckpointError, match="every checkpoint"):
        train(tiny(), tmp_path)
    assert (tmp_path / "ledger.txt").read_text() == before
    gc.collect()


def flip_bits(directory):
    """Flip one bit in the middle of every array file."""
    files = [f for f in (directory / "state").rglob("*") if f.parent.name == "d"]
    assert files
    for file in files:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))


def test_a_card_written_while_replaying_tells_of_all_releases(tmp_path, monkeypatch):
    config = tiny(**{"run.log_every": 1, "run.eval_every": 1})
    with monkeypatch.context() as patch:
        crash_after(patch, 11)  # Released and logged: 11 steps. Saved: 8.
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path)
    with monkeypatch.context() as patch:
        write = report.PrivacyCard.write
        seen = []

        def watched(self, directory):
            seen.append(self.steps_taken)
            write(self, directory)

        patch.setattr(report.PrivacyCard, "write", watched)
        train(config, tmp_path)
    assert seen == [11, 11, 11, 12, 12, 12]  # the last also beside the export


def test_an_export_without_its_run_is_not_overwritten(tmp_path):
    train(tiny(), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "ledger.txt").unlink()
    with pytest.raises(ConfigError, match="holds the export of another run"):
        train(tiny(), tmp_path)


def test_a_lost_ledger_is_no_permission(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        crash_after(patch, 10)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path)
    (tmp_path / "ledger.txt").unlink()
    with pytest.raises(NoiseReuseError, match="does not record the release of step 0"):
        train(tiny(), tmp_path)


@pytest.mark.parametrize(
    ("write", "step"),
    thinned(
        [
            ("metrics", 6),
            ("metrics", 8),
            ("metrics", 12),
            ("checkpoint", 4),
            ("checkpoint", 8),
            ("checkpoint", 12),
            ("card", 6),
            ("card", 8),
            ("card", 12),
        ],
        4,
    ),
)
def test_a_crash_between_two_writes_leaves_no_understated_card(
    write, step, tmp_path, monkeypatch
):
    target, name, at = {
        "metrics": (metric_writers.AllWriters, "write", lambda args: args[1]),
        "checkpoint": (checkpoint.Checkpoints, "save", lambda args: args[1]),
        "card": (report.PrivacyCard, "write", lambda args: args[0].steps_taken),
    }[write]
    honest = getattr(target, name)

    def dying(*args, **kwargs):
        if at(args) == step:
            raise KeyboardInterrupt
        return honest(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, dying)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path)
    published = metrics_of(tmp_path)
    if published:
        assert card(tmp_path)["steps_taken"] >= published[-1]["step"]
    train(tiny(), tmp_path)
    assert card(tmp_path)["steps_taken"] == 12


def test_initialisation_sees_no_example(tmp_path):
    config = tiny(model={"name": "tests.leaky:leaky", "num_classes": 10})
    experiment = build_experiment(config)
    transform = private(
        experiment.mechanism, experiment.optimizer, noise_key=root_key(1)
    )
    state = init_state(config, experiment, transform)
    assert not np.any(state.params["first"])
    assert np.any(experiment.source[[0]]["image"])


def test_lost_checkpoints_are_no_fresh_start(tmp_path):
    train(tiny(), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(NoiseReuseError, match="no checkpoint to go on from"):
        train(tiny(), tmp_path)


def test_a_replayed_step_that_comes_out_differently_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        crash_after(patch, 10)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path)
    # Stand in for whatever changed the sum of step 9: say it released something else.
    path = tmp_path / "ledger.txt"
    lines = path.read_text().splitlines()
    assert lines[9].startswith("9 ")
    lines[9] = f"9 12345 {lines[9].split()[2]}"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(NoiseReuseError, match="step 9 was released before"):
        train(tiny(), tmp_path)


def test_a_finished_run_is_reported_again_and_not_repeated(
    tmp_path, undisturbed, capsys
):
    shutil.copytree(undisturbed, tmp_path / "copy")
    before = (tmp_path / "copy" / "ledger.txt").read_text()
    state = train(tiny(), tmp_path / "copy")
    assert int(state.private.step) == 12
    assert (tmp_path / "copy" / "ledger.txt").read_text() == before
    assert "test/accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"mechanism.clip_norm": 2.0}, ["mechanism.clip_norm"]),
        ({"mechanism.steps": 24}, ["mechanism.steps"]),
        (
            {"optimizer.learning_rate": 0.5, "run.seed": 2},
            ["optimizer.learning_rate", "run.seed"],
        ),
        ({"compute.physical_batch_size": 32}, ["compute.physical_batch_size"]),
        ({"run.log_sensitive": True}, ["run.log_sensitive"]),
    ],
)
def test_a_workdir_of_another_config_is_refused_with_the_keys(
    change, names, tmp_path, undisturbed
):
    shutil.copytree(undisturbed, tmp_path / "copy")
    with pytest.raises(ConfigError, match="holds a run that differs in") as error:
        train(tiny(**change), tmp_path / "copy")
    for name in names:
        assert name in str(error.value)
    assert "run.log_every" not in str(error.value)


def test_resume_on_changed_data_is_refused(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    arrays = {
        f"{kind}_{split}": value
        for split in ("train", "test")
        for kind, value in (
            ("x", rng.integers(0, 256, (300, 8, 8), dtype=np.uint8)),
            ("y", rng.integers(0, 10, 300, dtype=np.uint8)),
        )
    }
    file = tmp_path / "data.npz"
    sources = {
        f"{group}.source": {
            "name": "dpjax.data.arrays:npz",
            "path": str(file),
            "split": s,
        }
        for group, s in (("data", "train"), ("evaluation", "test"))
    }
    np.savez(file, **arrays)
    with monkeypatch.context() as patch:
        crash_after(patch, 10)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(**sources), tmp_path / "run")
    arrays["x_train"][0] += 1
    np.savez(file, **arrays)
    with pytest.raises(ConfigError, match=r"differs in resolved\.data"):
        train(tiny(**sources), tmp_path / "run")


def test_how_often_to_log_may_change_on_resume(tmp_path, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        crash_after(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path)
    train(tiny(**{"run.log_every": 2, "run.keep_checkpoints": 1}), tmp_path)
    assert_same_export(tmp_path, undisturbed)


def test_secrets_from_the_os_differ_between_runs(tmp_path):
    config = tiny(**{"run.seed": None, "mechanism.steps": 1})
    states = [train(config, tmp_path / name) for name in "ab"]
    for name in ("private.noise_key", "loss_key", "init_key"):
        key = operator.attrgetter(name)
        one, other = (jax.random.key_data(key(state)) for state in states)
        assert not np.array_equal(one, other), name
    seeds = [np.asarray(s.sampling_seed) for s in states]
    assert not np.array_equal(*seeds)
    assert card(tmp_path / "a")["key_source"] == "operating system entropy"
    assert card(tmp_path / "a")["private"]


def test_secrets_stay_in_the_checkpoints(tmp_path):
    state = train(tiny(**{"run.seed": None}), tmp_path)
    words = [
        *np.ravel(jax.random.key_data(state.private.noise_key)),
        *np.ravel(state.sampling_seed),
    ]
    for path in tmp_path.rglob("*"):
        if path.is_dir() or "checkpoints" in path.relative_to(tmp_path).parts:
            continue
        content = path.read_bytes()
        for word in words:
            assert np.uint32(word).tobytes() not in content, path
            assert str(word).encode() not in content, path
    assert (tmp_path / "checkpoints").stat().st_mode & 0o077 == 0


def test_a_written_seed_makes_the_card_say_not_private(undisturbed):
    found = card(undisturbed)
    assert not found["private"]
    assert any("seed=1" in flag and "not private" in flag for flag in found["flags"])
    assert "NOT PRIVATE" in (undisturbed / "privacy_card.md").read_text()


def test_sensitive_statistics_are_logged_only_when_asked_and_flagged(tmp_path):
    train(tiny(**{"run.log_sensitive": True}), tmp_path)
    records = metrics(tmp_path)
    assert 80 < records[-1]["sensitive/batch_size"] < 210
    assert 0 < records[-1]["sensitive/loss"] < 5
    assert any("un-noised statistics" in flag for flag in card(tmp_path)["flags"])


def test_private_evaluation_is_marked_in_metrics_and_card(tmp_path):
    train(tiny(**{"evaluation.provenance": "private"}), tmp_path)
    assert "private_test/accuracy" in metrics(tmp_path)[-1]
    assert any("evaluated on private data" in flag for flag in card(tmp_path)["flags"])


def test_delta_of_one_over_n_warns_and_is_flagged(tmp_path, caplog):
    train(tiny(**{"mechanism.delta": 1e-3}), tmp_path)
    assert "delta=0.001 is not below 1/num_examples" in caplog.text
    assert any("delta is not below" in flag for flag in card(tmp_path)["flags"])


def test_diverged_training_stops_with_the_step(tmp_path):
    optimizer = {"name": "optax:sgd", "learning_rate": 1e38}
    with pytest.raises(FloatingPointError, match="the update of step"):
        train(tiny(optimizer=optimizer), tmp_path)


def test_microbatches_change_the_sum_by_rounding_only(tmp_path, undisturbed):
    train(tiny(**{"compute.microbatch_size": 16}), tmp_path)
    last, other = metrics(tmp_path)[-1], metrics(undisturbed)[-1]
    assert last["update_norm"] == pytest.approx(other["update_norm"], rel=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [
        {"name": "dpjax.privacy:FullBatch"},
        {"name": "dpjax.privacy:ShuffledFixed", "batch_size": 128},
        {"name": "dpjax.privacy:TruncatedPoisson", "rate": 0.1, "capacity": 160},
    ],
    ids=lambda s: s["name"],
)
def test_every_sampling_trains_and_says_what_it_assumes(sampling, tmp_path):
    train(tiny(**{"mechanism.sampling": sampling, "mechanism.steps": 4}), tmp_path)
    found = card(tmp_path)
    amplified = sampling["name"].endswith("TruncatedPoisson")
    assert found["amplified"] == amplified
    said = "accounted without amplification by sampling" in found["flags"]
    assert said == (not amplified)
    assert math.isfinite(found["epsilon"])


def test_the_non_private_twin_trains_and_claims_nothing(tmp_path):
    train(tiny("nonprivate"), tmp_path)
    found = card(tmp_path)
    assert found["epsilon"] == "inf"
    assert not found["private"]
    assert "NOT PRIVATE" in (tmp_path / "privacy_card.md").read_text()
    json.loads((tmp_path / "privacy_card.json").read_text(), parse_constant=pytest.fail)


def test_all_chunks_of_a_batch_are_in_its_sum():
    """A step in chunks of 32 is one in a chunk that holds the batch, but for rounding."""

    def after_a_step(size):
        changes = {"compute.physical_batch_size": size, "compute.engine": "vmap"}
        config = tiny(**changes)
        experiment = build_experiment(config)
        transform = private(
            experiment.mechanism, experiment.optimizer, noise_key=root_key(1)
        )
        state = init_state(config, experiment, transform)
        stream = batches(
            experiment.source,
            experiment.mechanism,
            seed=sampling_seed(state),
            physical_batch_size=size,
        )
        batch = next(stream)
        stream.close()
        step = make_train_step(config, experiment, transform)
        return len(batch.chunks), step(state, batch)[0].params

    (many, found), (one, expected) = after_a_step(32), after_a_step(512)
    assert (many > 3, one) == (True, 1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), found, expected
    )


def test_every_step_has_randomness_of_its_own_in_the_loss():
    config = tiny(**{"compute.engine": "vmap"})

    def random_slope(params, example, key):
        del example
        size = 1e-3 * jax.random.uniform(key)
        return size * sum(x.sum() for x in jax.tree.leaves(params))

    experiment = dataclasses.replace(build_experiment(config), loss=random_slope)
    transform = private(
        experiment.mechanism, experiment.optimizer, noise_key=root_key(1)
    )
    state = init_state(config, experiment, transform)
    step = make_train_step(config, experiment, transform)
    stream = batches(
        experiment.source,
        experiment.mechanism,
        seed=sampling_seed(state),
        physical_batch_size=64,
    )
    chunk = next(stream).chunks[0]
    stream.close()
    later = state._replace(private=state.private._replace(step=jax.numpy.int32(1)))
    elsewhere = state._replace(loss_key=jax.random.key(7))
    found = [
        step.accumulate("gradient", each, step.begin("gradient", each), chunk)[0]
        for each in (state, later, elsewhere)
    ]
    sums = {float(jax.tree.leaves(one.total)[0].sum()) for one in found}
    assert len(sums) == 3


def test_the_moving_average_remembers_by_its_decay_and_little_at_first():
    before, now = {"w": np.float32([1.0])}, {"w": np.float32([2.0])}
    for step, weight in ((0, 0.1), (8, 0.5), (10**6, 0.9)):
        found = _moving_average(before, now, decay=0.9, step=jax.numpy.int32(step))
        np.testing.assert_allclose(found["w"], weight * 1.0 + (1 - weight) * 2.0)


def test_augmentation_and_moving_average_train(tmp_path):
    augment = {
        "transform": {"name": "dpjax.data.augment:flip_and_crop", "padding": 1},
        "views": 3,
    }
    state = train(tiny(**{"augment": augment, "evaluation.ema_decay": 0.9}), tmp_path)
    different = jax.tree.map(np.array_equal, state.average, state.params)
    assert not any(jax.tree.leaves(different))
    without = train(tiny(**{"evaluation.ema_decay": 0.0}), tmp_path / "without")
    assert without.average == ()


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch, undisturbed):
    record = Ledger.record

    def interrupt_twice(self, step, fingerprint):
        record(self, step, fingerprint)
        if step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "record", interrupt_twice)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path)
    train(tiny(), tmp_path)
    assert_same_export(tmp_path, undisturbed)


def test_interrupted_is_raised_after_saving(tmp_path, monkeypatch, undisturbed):
    record, handler = Ledger.record, signal.getsignal(signal.SIGINT)

    def interrupt(self, step, fingerprint):
        record(self, step, fingerprint)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "record", interrupt)
        with pytest.raises(Interrupted, match="of 12"):
            train(tiny(), tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler
    train(tiny(), tmp_path)
    assert_same_export(tmp_path, undisturbed)
