"""The counts of the scaling page are those of the programs; its model is arithmetic."""

import math

import numpy as np
import pytest

from dpjax.models.mlp import mlp
from experiments.benchmarks import scaling, workloads
from experiments.benchmarks.scaling import Accelerator, Plan


def test_a_step_reduces_one_gradient_and_shares_the_flops(monkeypatch):
    model = mlp(features=(), num_classes=10, activation="relu")
    recipe = workloads._images(model, side=8, channels=1, size=16)
    monkeypatch.setitem(workloads.WORKLOADS, "mlp", lambda: recipe)
    one, four = (scaling.count("mlp", mesh, 16) for mesh in ((1, 1), (4, 1)))
    assert one["chunk"]["collectives"] == four["chunk"]["collectives"] == {}
    assert one["end"]["collectives"] == {}
    (reduced,) = four["end"]["collectives"].values()
    # Besides the gradient, seals and bounds: some scalars.
    assert 0 <= reduced["bytes"] - one["params_bytes"] < 100
    share = four["chunk"]["flops"] / one["chunk"]["flops"]
    assert share == pytest.approx(1 / 4, rel=0.05)


def test_collectives_are_counted_by_kind_with_all_their_arrays():
    text = """
ENTRY %main (x: f32[2,3]) -> f32[4] {
  %a = (f32[2,3]{1,0}, pred[]) all-reduce(%x, %y), replica_groups={}
  %b = bf16[8]{0} all-gather-start(%z)
  %c = f32[4]{0} add(%all-reduce, %d)
}
"""
    assert scaling.by_kind(text) == {
        "all-reduce": {"count": 1, "bytes": 25},
        "all-gather": {"count": 1, "bytes": 16},
    }


def test_expected_chunks_are_those_of_poisson_batches():
    sizes = np.random.default_rng(0).poisson(1000, size=100_000)
    for rows in (64, 900, 1000, 2000):
        simulated = np.ceil(sizes / rows).mean()
        assert scaling.expected_chunks(1000, rows) == pytest.approx(simulated, abs=0.02)


def test_a_reduction_within_a_node_does_not_use_the_slow_links():
    on = Accelerator(fast=100.0, slow=1.0, node=4, latency=0.0)
    assert scaling.reduction(1000, 1, on) == 0
    assert scaling.reduction(1000, 4, on) == 2 * 1000 * 3 / 4 / 100
    across = 2 * (1000 / 4) * 1 / 2 / 1
    assert scaling.reduction(1000, 8, on) == scaling.reduction(1000, 4, on) + across


def test_one_accelerator_with_nothing_but_flops_is_as_fast_as_it_can_be():
    one = {
        "workload": "gpt",
        "rows": 2,
        "params_bytes": 4,
        "chunk": {"flops": 20.0},
        "end": {"bytes_accessed": 0.0},
    }
    on = Accelerator(latency=0.0)
    found = scaling.step_model(one, Plan(batch=100, rows=1), 1, 1, on)
    assert found["efficiency"] == pytest.approx(100 / 100.5, rel=1e-3)
    assert math.isclose(found["seconds"]["step"], found["chunks"] * 10 / on.flops)


def test_wrong_options_are_one_line(capsys):
    assert scaling.main(["--out=x.json", "--workloads=nope"]) == 2
    assert "--workloads=nope is unknown" in capsys.readouterr().err
