"""The counts of the scaling page are those of the programs; its model is arithmetic."""

import json
import math

import numpy as np
import pytest

from dpjax.models.llama import llama
from dpjax.models.peft import lora
from experiments import benchmark
from experiments.benchmarks import scale, scaling
from experiments.benchmarks.scaling import Accelerator


def tiny(*, adapters=False):
    model = llama(
        vocab_size=128,
        layers=2,
        width=32,
        heads=4,
        kv_heads=2,
        hidden=64,
        length=24,
        rotary_base=1e4,
        epsilon=1e-5,
        tied=False,
        dtype="float32",
        scan=True,
        remat=True,
    )
    if not adapters:
        return scale.Workload(model, (".*",))
    model = lora(model, rank=2, scale=1.0, targets=(".*(attention|mlp)/.*",))
    return scale.Workload(model, (r".*/lora_[ab]",))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The command, on what 8 devices can show."""
    out = tmp_path_factory.mktemp("scale") / "scaling.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale, "LENGTH", 24)
        patch.setattr(scale, "LAYOUTS", ((8, 1, 1), (1, 8, 1), (2, 2, 2)))
        patch.setitem(scale.WORKLOADS, "all", tiny)
        patch.setitem(scale.WORKLOADS, "adapters", lambda: tiny(adapters=True))
        patch.setattr(benchmark, "_prepare_jax", lambda device: None)
        command = ["--suite=scale", "--workloads=all,adapters", f"--out={out}"]
        assert benchmark.main([*command, "--engines=ghost,auto"]) == 0
    return json.loads(out.read_text()), out.with_suffix(".md").read_text()


def rows_of(results, **wanted):
    return [
        row
        for row in results[0]["rows"]
        if all(row[key] == value for key, value in wanted.items())
    ]


def test_there_is_a_row_for_each_engine_on_each_layout(results):
    found = {(r["workload"], r["layout"], r["engine"]) for r in results[0]["rows"]}
    assert len(found) == len(results[0]["rows"]) == 2 * 3 * 3
    for row in rows_of(results, engine="plain"):
        assert row["peak_ratio"] == row["flops_ratio"] == 1
    for row in results[0]["rows"]:
        assert row["layout"] in results[1]
        assert row["peak_bytes"] > row["temporaries"] > 0


def test_layers_are_gathered_one_by_one_and_no_rows(results):
    for row in results[0]["rows"]:
        # (Of the gradient without privacy, XLA may gather the rows for the token table.)
        if row["engine"] != "plain":
            assert row["layer_gathered"] <= 1
            assert row["rows_moved"] == 0
        assert row["data_reductions"] == 0


def test_replicas_exchange_nothing_but_sums(results):
    for row in rows_of(results, layout="8x1x1"):
        assert row["collective_bytes"] == 0
        assert row["collective_ratio"] is None


def test_one_pass_computes_and_exchanges_what_training_without_privacy_does(results):
    (row,) = rows_of(results, workload="adapters", layout="1x8x1", engine="auto")
    assert row["flops_ratio"] < 1.2  # a tiny model: norms are no small part of it
    assert row["collective_ratio"] < 1.1


def test_expected_chunks_are_those_of_poisson_batches():
    sizes = np.random.default_rng(0).poisson(1000, size=100_000)
    for rows in (64, 900, 1000, 2000):
        simulated = np.ceil(sizes / rows).mean()
        assert scaling.expected_chunks(1000, rows) == pytest.approx(simulated, abs=0.02)


def test_a_reduction_within_a_node_does_not_use_the_slow_links():
    on = Accelerator(fast=100.0, slow=1.0, node=4, latency=0.0)
    assert scaling.reduction(1000, 1, 1, on) == 0
    assert scaling.reduction(1000, 4, 1, on) == 2 * 1000 * 3 / 4 / 100
    across = 2 * (1000 / 4) * 1 / 2 / 1
    assert scaling.reduction(1000, 8, 1, on) == (
        scaling.reduction(1000, 4, 1, on) + across
    )
    # Nodes that hold one replica each have nothing to reduce inside.
    assert scaling.reduction(1000, 2, 4, on) == 2 * 1000 * 1 / 2 / 1


def test_one_accelerator_with_nothing_but_flops_is_as_fast_as_it_can_be():
    row = {
        "workload": "w",
        "engine": "plain",
        "flops": 10.0,
        "collectives": 0,
        "collective_bytes": 0,
        "sum_bytes": 4,
        "end_bytes": 0.0,
    }
    on = Accelerator(latency=0.0)
    found = scaling.step_model(row, row, devices=1, fsdp=1, on=on)
    assert found["efficiency"] == pytest.approx(1, rel=1e-3)
    assert math.isclose(found["seconds"]["step"], found["chunks"] * 10 / on.flops)


def test_wrong_options_are_one_line(capsys):
    for wrong, message in (
        ("--workloads=nope", "--workloads=nope is unknown"),
        ("--engines=nope", "--engines=nope is unknown"),
        ("--device=gpu", "--suite=scale counts on virtual CPU devices"),
    ):
        assert benchmark.main(["--suite=scale", "--out=x.json", wrong]) == 2
        assert message in capsys.readouterr().err
