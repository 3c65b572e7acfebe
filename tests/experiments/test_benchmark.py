import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpjax
from dpjax.clipping import vmap
from dpjax.models.mlp import mlp
from experiments.benchmark import main
from experiments.benchmarks import (
    programs,
    steps,
    suite,
    throughput,
    transformers,
    workloads,
)
from experiments.shared import report, timing

SHAPE = transformers.Shape(layers=2, width=8, heads=2, hidden=16, length=6, outputs=11)
NONPRIVATE = {"grad", "vmap_mean", "grad_mb1", "vmap_mean_mb1"}


def tiny(size=4):
    model = mlp(features=(8,), num_classes=10, activation="relu")
    return workloads._images(model, side=4, channels=1, size=size)


@pytest.fixture(autouse=True)
def tiny_workload(monkeypatch):
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", tiny)
    # The command sets both for JAX, which these tests have imported already.
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def benchmark(path, *arguments):
    out = path / "out.json"
    command = ["--suite=clipping", "--workloads=tiny", f"--out={out}", *arguments]
    assert main(command) == 0
    return json.loads(out.read_text())


@pytest.mark.long
def test_measures_engines_against_the_fastest_without_privacy(tmp_path, capsys):
    plot = tmp_path / "out.png"
    results = benchmark(
        tmp_path,
        "--engines=bookkeeping",
        "--rounds=1",
        "--device=cpu",
        f"--plot={plot}",
    )
    rows = {row["engine"]: row for row in results["rows"]}
    assert all(tuple(row) == timing.COLUMNS for row in rows.values())
    engines = rows.keys() - NONPRIVATE
    assert engines == {"vmap", "bookkeeping", "vmap_mb1"}
    assert "grad" in rows

    times = {name: row["time_ms"] for name, row in rows.items()}
    baseline = results["baselines"]["tiny"]
    assert baseline == min(rows.keys() - engines, key=times.get)
    for name, row in rows.items():
        # With one round, the median of the ratios is the ratio of the medians.
        np.testing.assert_allclose(row["time_ratio"], times[name] / times[baseline])
        assert 0.8 < row["flops_ratio"] < 2.5
        assert (row["max_rel_error"] is None) == (name not in engines)
        grad_s = rows["grad"]["compile_s"]
        np.testing.assert_allclose(row["compile_ratio"], row["compile_s"] / grad_s)
    assert rows["vmap"]["max_rel_error"] == 0
    assert rows["bookkeeping"]["max_rel_error"] < 1e-5
    assert rows["vmap"]["temp_bytes_ratio"] > 1

    output = capsys.readouterr().out
    assert "bookkeeping" in output
    assert str(plot) in output
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert results["command"].startswith("python -m experiments.benchmark --suite=clip")
    assert results["versions"]["jax"] == jax.__version__
    assert results["hardware"]["device"] == "cpu"


@pytest.mark.long
def test_compile_times_are_medians_of_rounds(tmp_path, monkeypatch):
    # Of grad, then of bookkeeping; what comes before the three rounds does not count.
    seconds = [iter([50, 60, 2, 4, 8]), iter([50, 60, 6, 4, 16])]
    programs_seen, clock, compiled = [], [0.0], suite.programs.compiled

    def slow(program, arguments):
        if program not in programs_seen:
            programs_seen.append(program)
        clock[0] += next(seconds[programs_seen.index(program)])
        return compiled(program, arguments)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(suite.programs, "compiled", slow)
    out = tmp_path / "out.json"
    command = ["--suite=compiling", "--workloads=tiny", "--engines=bookkeeping"]
    assert main([*command, f"--out={out}", "--rounds=3"]) == 0
    grad, bookkeeping = json.loads(out.read_text())["rows"]
    assert (grad["engine"], bookkeeping["engine"]) == ("grad", "bookkeeping")
    assert (grad["compile_s"], bookkeeping["compile_s"]) == (4, 6)
    assert (grad["compile_ratio"], bookkeeping["compile_ratio"]) == (1, 2)
    assert bookkeeping["flops_ratio"] > 1
    assert bookkeeping["time_ms"] is None


@pytest.mark.long
def test_measures_mechanisms_against_dp_sgd_by_the_same_engine(tmp_path):
    out = tmp_path / "out.json"
    command = ["--suite=mechanisms", "--workloads=tiny", "--engines=bookkeeping"]
    assert main([*command, f"--out={out}", "--rounds=1"]) == 0
    rows = json.loads(out.read_text())["rows"]
    for extent in ("sums", "whole"):
        plain, dice, diff2 = (
            next(r for r in rows if r["engine"] == f"bookkeeping/{mechanism}/{extent}")
            for mechanism in ("dp_sgd", "dice_sgd", "diff2")
        )
        assert plain["time_ratio"] == plain["flops_ratio"] == 1
        for row in (dice, diff2):
            ratio = row["time_ms"] / plain["time_ms"]
            np.testing.assert_allclose(row["time_ratio"], ratio)
        if extent == "sums":  # the noise of so small a model costs more than they do
            assert 1 < dice["flops_ratio"] < 2 < diff2["flops_ratio"] < 4


def test_measures_throughput_and_the_largest_batch(tmp_path, monkeypatch):
    # A CPU does not say what it lends, nor knows the compiler's options of a GPU.
    room = 2**20
    monkeypatch.setattr(throughput, "memory", lambda: room)
    monkeypatch.setattr(throughput, "_UNTUNED", {})
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", lambda: tiny(size=8))
    rows, baseline = throughput.measure("tiny", engines=["bookkeeping"], rounds=1)
    assert baseline == "grad"
    assert [row["engine"] for row in rows] == ["grad", "bookkeeping", "vmap"]
    grad, bookkeeping, vmap = rows
    for row in rows:
        assert tuple(row) == throughput.COLUMNS
        assert row["batch"] == 8
        ratios = {
            "throughput_ratio": "examples_per_s",
            "largest_batch_ratio": "largest_batch",
        }
        for name, of in ratios.items():
            np.testing.assert_allclose(row[name], row[of] / grad[of])
    assert bookkeeping["max_rel_error"] < 1e-5
    assert vmap["max_rel_error"] == 0
    assert vmap["largest_batch"] < bookkeeping["largest_batch"]

    # The largest batch fits, the next one does not.
    workload, size = workloads.build("tiny"), grad["largest_batch"]
    program = programs.mean_gradient(workload.loss)
    fits, more = (
        throughput._allocated(throughput._compiled(program, workload, n, None))
        for n in (size, size + size // 10)
    )
    assert fits <= 1.05 * room
    assert more > room


@pytest.mark.long
@pytest.mark.parametrize("kind", ["dp_sgd", "dice_sgd", "diff2"])
def test_a_step_that_is_measured_is_one_that_trains(kind):
    """Its sums are those of the query, and what it returns has moved by their release."""
    workload = workloads.build("tiny")
    mechanism = steps.plans(4)[kind]
    start = steps._after_a_step(
        workload.loss, mechanism, workload.params, workload.batch
    )
    params, state = start
    assert int(state.step) == 1

    def run(engine, extent):
        program = steps.step(workload.loss, engine, mechanism, number=1, extent=extent)
        arguments = (start, workload.batch, jax.random.key(0), jnp.float32(1))
        return jax.jit(program)(*arguments)

    phase = mechanism.phase(1)
    assert phase == ("difference" if kind == "diff2" else "gradient")
    query = mechanism.query(phase, params, state.mechanism)
    clipped, _ = vmap(workload.loss, query, workload.batch, jax.random.key(0))
    total, residual = run("bookkeeping", "sums")
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, total, clipped.total)
    jax.tree.map(close, residual, clipped.residual)

    transform = dpjax.private(mechanism, optax.adam(1e-3), noise_key=state.noise_key)
    updates, _ = transform.update(clipped, state, params)
    after, moved = run("bookkeeping", "whole")
    assert int(moved.step) == 2
    jax.tree.map(close, after, optax.apply_updates(params, updates))


def test_compiles_only_what_is_too_large_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(workloads, "COMPILE_ONLY", ("tiny",))
    workload = workloads.build("tiny")
    assert {type(x) for x in jax.tree.leaves(workload.params)} == {jax.ShapeDtypeStruct}
    # What this machine has is not enough.
    planning = sys.modules["dpjax.clipping.engines.auto"]
    monkeypatch.setattr(planning, "default_budget", lambda: 1.0)
    results = benchmark(tmp_path, "--engines=auto", "--rounds=1")
    assert results["baselines"] == {"tiny": None}
    assert [row["engine"] for row in results["rows"]] == ["grad", "vmap", "auto"]
    for row in results["rows"]:
        missing = {column for column, value in row.items() if value is None}
        assert missing == {"time_ratio", "time_ms", "max_rel_error"}


def test_errors_are_of_the_sum_and_of_the_norms():
    total, norms = {"w": np.array([3.0, 4.0])}, np.array([1.0, 2.0])
    wrong_sum = {"w": np.array([3.0, 4.5])}, norms
    wrong_norm = total, np.array([1.0, 1.5])
    for wrong, error in [(wrong_sum, 0.1), (wrong_norm, 0.25)]:
        found = programs.relative_error(wrong, (total, norms))
        np.testing.assert_allclose(found, error, rtol=1e-6)


def test_memory_is_that_of_a_schedule_that_spares_it():
    def program(x):
        # One after the other needs one temporary; side by side, three.
        return [f(x) @ x for f in (jnp.sin, jnp.cos, jnp.exp)]

    size = 4 * 256 * 256
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    compiled = programs.compiled(program, (x,))
    assert size <= compiled.temp_bytes < 2 * size
    default = compiled.run.memory_analysis().temp_size_in_bytes
    assert default >= 2 * size, "else this test could not fail"


def test_the_clip_norm_clips_some(monkeypatch):
    workload = workloads.build("tiny")
    clipped = programs.private(workload.loss, "vmap")

    def unclipped(params, batch, key, clip_norm):
        return clipped(params, batch, key, 1e9)

    grad = {"grad": programs.mean_gradient(workload.loss)}
    monkeypatch.setattr(suite, "_nonprivate", lambda workload: grad)
    whole = {"clipped": clipped, "unclipped": unclipped}
    rows, baseline = suite.compare(workload, whole, {}, rounds=1)
    assert baseline == "grad"
    errors = {row["engine"]: row["max_rel_error"] for row in rows}
    assert errors["clipped"] == 0
    assert 0.01 < errors["unclipped"] < 1


@pytest.mark.parametrize("size", [None, 2])
def test_programs_without_privacy_agree(size):
    workload = workloads.build("tiny")
    arguments = (workload.params, workload.batch, jax.random.key(0), jnp.float32(1.0))
    gradient = jax.jit(programs.mean_gradient(workload.loss))(*arguments)
    for make in (programs.mean_gradient, programs.mean_of_gradients):
        other = jax.jit(make(workload.loss, microbatch_size=size))(*arguments)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
            other,
            gradient,
        )


def test_candidates_take_turns_in_changing_order():
    calls = []
    slow = functools.partial(calls.append, "a"), functools.partial(calls.append, "b")
    times = timing.alternate(dict(zip("ab", slow, strict=True)), rounds=8)
    assert [len(times[name]) for name in "ab"] == [8, 8]
    # After a warm-up and an estimate of each, one block of repeats for each turn.
    blocks = np.reshape(calls[4:], (8, 2, -1))
    assert (blocks == blocks[:, :, :1]).all()
    firsts = blocks[:, 0, 0].tolist()
    assert set(firsts) == {"a", "b"}
    assert (blocks[:, 1, 0] != blocks[:, 0, 0]).all()


def test_the_ratio_is_the_median_over_rounds():
    # A slow second round of the machine changes nothing.
    assert timing.ratio([2.0, 60.0, 6.0], [1.0, 20.0, 2.0]) == 3.0
    assert timing.fastest({"a": [1.0, 9.0, 9.0], "b": [2.0, 3.0, 4.0]}) == "b"


def filled(init):
    """Return parameters as ``init`` shapes them, without its compilation."""
    return jax.tree.map(
        lambda x: 0.3 * np.sin(np.arange(x.size, dtype=x.dtype)).reshape(x.shape),
        jax.eval_shape(init, jax.random.key(0)),
    )


@pytest.mark.parametrize("tied", [False, True])
def test_stacked_blocks_compute_the_same(tied):
    init = functools.partial(transformers.init_gpt, shape=SHAPE, tied=tied)
    params = filled(init)
    stacked = params | {
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *params["blocks"])
    }
    shapes = jax.eval_shape(functools.partial(init, stacked=True), jax.random.key(0))
    assert jax.tree.map(np.shape, stacked) == jax.tree.map(np.shape, shapes)
    assert ("head" in params) != tied

    loss = jax.jit(functools.partial(transformers.gpt_loss, heads=SHAPE.heads))
    tokens = np.arange(7) * 5 % 11
    np.testing.assert_allclose(loss(stacked, tokens), loss(params, tokens), rtol=1e-6)


def test_causal_attention_sees_the_past_only():
    params = filled(functools.partial(transformers.init_gpt, shape=SHAPE, tied=True))
    x = np.sin(np.arange(48, dtype=np.float32)).reshape(SHAPE.length, SHAPE.width)
    moved = x.copy()
    moved[3, 0] += 1

    @jax.jit
    def run(x):
        return transformers._block(params["blocks"][0], x, heads=SHAPE.heads)

    changed = np.abs(run(x) - run(moved)).max(axis=1)
    assert (changed > 1e-6).tolist() == [False] * 3 + [True] * 3


def test_adapters_add_to_the_frozen_matrices():
    base = filled(functools.partial(transformers.init_gpt, shape=SHAPE, tied=False))
    lora = filled(functools.partial(transformers.init_lora, shape=SHAPE))

    @jax.jit
    def loss(params):
        return transformers.gpt_loss(params, np.arange(7), heads=SHAPE.heads)

    silent = jax.tree.map(np.zeros_like, lora)
    adapted = transformers.with_lora(base, silent)
    np.testing.assert_allclose(loss(adapted), loss(base), rtol=1e-6)
    gradient = jax.grad(lambda lora: loss(transformers.with_lora(base, lora)))(lora)
    leaves = jax.tree.leaves(gradient)
    assert len(leaves) == 2 * 6 * SHAPE.layers
    assert all(np.abs(leaf).max() > 0 for leaf in leaves)


@pytest.mark.parametrize(
    ("name", "count"),
    # Those of the published models, with heads of their own.
    [
        ("gpt2_small_1024", 124_439_808),
        ("vit_b16", 86_567_656 - 990 * 769),
        # 128 positions instead of 512, and a layer in place of the pooler.
        ("roberta_large", 355_359_744 - 384 * 1024 + 2 * 1025),
    ],
)
def test_sizes_of_published_models(name, count):
    recipe = workloads.WORKLOADS[name]()
    params, batch = jax.eval_shape(recipe.arrays)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    example = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch.examples
    )
    out = jax.eval_shape(recipe.loss, params, example, jax.random.key(0))
    assert (out.shape, out.dtype) == ((), jnp.float32)


def test_draws_the_ratios_of_the_engines():
    rows = [
        timing.row("mlp", "grad", time_ratio=1.0),
        timing.row("mlp", "vmap", time_ratio=50.0, max_rel_error=0.0),
        timing.row("mlp", "vmap_mb8", time_ratio=20.0, max_rel_error=0.0),
        timing.row("gpt", "vmap", time_ratio=0.5, max_rel_error=0.0),
        timing.row("gpt2", "vmap", flops_ratio=1.0),
    ]
    (axes,) = report.draw(rows).axes
    bars = {
        container.get_label(): [bar.get_y() + bar.get_height() for bar in container]
        for container in axes.containers
    }
    assert bars == {"vmap": [50.0, 0.5], "vmap, microbatches": [20.0]}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["mlp", "gpt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=a.json"], "--suite=clipping is missing"),
        (["--suite=cliping", "--out=a.json"], "did you mean 'clipping'?"),
        (["--suite=clipping"], "--out=FILE.json is missing"),
        (["--suite=clipping,mechanisms", "--out=a.json"], "must be one suite"),
        (
            ["--suite=mechanisms", "--out=a.json", "--plot=a.png"],
            "--plot is for --suite=clipping, not mechanisms",
        ),
        (["--suite=clipping", "--out=a.txt"], "--out=a.txt must end with .json"),
        (["--suite=clipping", "--out=no/a.json"], "is in a directory that is absent"),
        (["--round=3"], "--round=3 is unknown; did you mean 'rounds'?"),
        (["--rounds="], "--rounds has no value"),
        (["--suite=clipping", "--rounds=0"], "--rounds=0 must be an integer"),
        (
            ["--suite=clipping", "--out=a.json", "--workloads=mlp,convnte"],
            "--workloads=convnte is unknown; did you mean 'convnet'?",
        ),
        (
            ["--suite=clipping", "--out=a.json", "--engines=gost"],
            "--engines=gost is unknown; did you mean 'ghost'?",
        ),
        (
            ["--suite=clipping", "--out=a.json", "--device=tpu"],
            "--device=tpu is unknown",
        ),
        (
            ["--suite=clipping", "--out=a.json", "--workloads=vit_b16"],
            "--workloads=vit_b16 needs a GPU",
        ),
        (["--suite=throughput", "--out=a.json"], "--suite=throughput needs a GPU"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_absent_is_an_error(tmp_path, monkeypatch, capsys):
    def absent():
        raise RuntimeError("no backend")

    monkeypatch.setattr(jax, "default_backend", absent)
    out = tmp_path / "a.json"
    assert main(["--suite=clipping", f"--out={out}", "--device=gpu"]) == 2
    assert capsys.readouterr().err == "error: --device=gpu: JAX finds no such device\n"


def test_wrong_names_come_before_any_device_is_started(tmp_path):
    code = (
        "import sys; from experiments.benchmark import main; "
        "assert main(['--help']) == 0; assert main(['--suit=x']) == 2; "
        "assert 'jax' not in sys.modules; "
        f"status = main(['--suite=clipping', '--out={tmp_path}/a.json', "
        "'--workloads=mpl']); "
        "from jax._src import xla_bridge; "
        "sys.exit(99 if xla_bridge.backends_are_initialized() else status)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2, result.stderr
    assert "--plot=FILE.png" in result.stdout
