"""What the README tells a user to do works."""

import re
import shlex

import jax
import numpy as np
import pytest

import dpjax
from dpjax.training.config import GROUPS
from experiments.train import main
from tests.runs import ROOT

README = (ROOT / "README.md").read_text()


def recipe():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    return block


@pytest.mark.long
def test_the_recipe_trains_a_private_model(capsys):
    names = {}
    exec(compile(recipe(), "README.md", "exec"), names)
    error = np.abs(np.asarray(names["params"]["w"]) - np.arange(5))
    assert error.max() < 0.5
    assert float(capsys.readouterr().out.split()[-1]) <= 3.0
    # What it says of the plan for this loss on a CPU.
    example = jax.tree.map(lambda x: x[0], names["source"][[0]])
    dpjax.explain(names["loss"], names["params"], example)
    for line in capsys.readouterr().out.splitlines():
        assert f"    {line.rstrip()}\n" in README


def test_own_model_loss_and_data_take_fewer_than_twenty_lines():
    """Imports and blank lines aside, from the data to the trained model."""
    code = [line for line in recipe().splitlines() if line.strip()]
    body = [line for line in code if not line.startswith(("import", "from"))]
    assert len(body) < 20


def test_the_config_table_names_every_group_and_key():
    for group, keys in GROUPS.items():
        row = re.search(rf"^\| `{group}` \|(.*)$", README, re.M)
        assert row, group
        for key in keys or ():
            assert f"`{key}`" in row[1], (group, key)


def test_the_command_of_make_train_is_the_one_described(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    makefile = (ROOT / "Makefile").read_text()
    config = re.search(r"--config=(configs/digits\S+)", makefile)[1]
    assert f"--config={config}" in README
    argv = shlex.split(f"--config={config} --config.run.dry_run=True")
    assert main(argv) == 0
    assert "epsilon = 3.00 at delta = 1e-05" in capsys.readouterr().out
