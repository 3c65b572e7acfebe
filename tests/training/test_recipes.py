"""Recipes of fine-tuning whose data and weights no network brings here.

What each variant trains is checked on its model in full size, by shapes alone.
"""

import importlib
import re
import shlex

import jax
import numpy as np
import pytest

from dpjax.models.partition import partition
from dpjax.training.config import WEIGHTS, build
from experiments.train import main
from launch import __main__ as launch

TOKENS = {"tokens": np.zeros(64, np.int32)}
IMAGE = {"image": np.zeros((32, 32, 3), np.float32)}

# From the published sizes: 12 layers, D = 768, V = 50257 or 50265, 1024 or 514 positions.
GPT2 = 124_439_808
ROBERTA = 124_055_040  # without a head
BLOCK_BIASES = 12 * (4 * 768 + 3072 + 768 + 2 * 768)
CLASSES = 768**2 + 768 + 768 * 2 + 2
SHAKESPEARE = 256 * 256 + 128 * 256 + 4 * (12 * 256**2 + 13 * 256) + 2 * 256

TRAINED = {
    ("e2e_gpt2", "full"): (TOKENS, GPT2),
    ("e2e_gpt2", "lora"): (TOKENS, 12 * 2 * 4 * (768 + 768)),
    ("e2e_gpt2", "prefix"): (TOKENS, 12 * 2 * 10 * 768),
    ("sst2_roberta", "infilling"): (TOKENS, ROBERTA + 768**2 + 3 * 768 + 50265),
    ("sst2_roberta", "full"): (TOKENS, ROBERTA + CLASSES),
    ("sst2_roberta", "lora"): (TOKENS, 12 * 2 * 8 * (768 + 768) + CLASSES),
    # The norm of the embeddings has a bias, too.
    ("sst2_roberta", "bitfit"): (TOKENS, BLOCK_BIASES + 768 + CLASSES),
    ("cifar10_vit", "head"): (IMAGE, 768 * 10 + 10),
    ("cifar10_vit", "film"): (IMAGE, 25 * 2 * 768 + 768 * 10 + 10),
    ("cifar10_vit", "all"): (IMAGE, 85_798_656 + 768 * 10 + 10),
    ("e2e_tiny_gpt", "lora"): (TOKENS, 2 * 8 * (4 * (128 + 128) + 2 * (128 + 512))),
    ("sst2_tiny_encoder", "private"): (TOKENS, 4096 * 64),
    ("shakespeare_gpt", ""): (TOKENS, SHAKESPEARE),
    ("llama_1b_dpsgd", "full"): (TOKENS, 1_100_048_384),  # as published of TinyLlama
    ("llama_8b_lora_dpsgd", "full"): (TOKENS, 41_943_040),  # as PEFT counts it
}


def without_weights(spec):
    """Return a model's spec without the part that reads a file."""
    if not isinstance(spec, dict):
        return spec
    if spec.get("name", "").startswith(WEIGHTS):
        return without_weights(spec["model"])
    return {key: without_weights(value) for key, value in spec.items()}


@pytest.mark.parametrize(("recipe", "variant"), TRAINED)
def test_a_variant_trains_what_it_says(recipe, variant):
    get_config = importlib.import_module(f"configs.{recipe}").get_config
    config = get_config(*filter(None, [variant])).to_dict()
    example, count = TRAINED[recipe, variant]
    model = build(without_weights(config["model"]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), example)
    trained, _ = partition(shapes, config["parameters"]["train"])
    assert sum(leaf.size for leaf in jax.tree.leaves(trained)) == count


@pytest.mark.parametrize(("recipe", "variant"), TRAINED)
def test_without_its_data_a_recipe_names_what_is_missing(
    recipe, variant, tmp_path, capsys
):
    argument = ",".join(filter(None, [variant, str(tmp_path / "absent")]))
    flag = f"--config=configs/{recipe}.py:{argument}"
    assert main([flag, "--config.run.dry_run=True"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert str(tmp_path / "absent") in error


# --- Larger than one device ---------------------------------------------------------------

TOYS = {"llama_1b_dpsgd": "1x8/1/cpu", "llama_8b_lora_dpsgd": "2x2x2/1/cpu"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A text of some 60 blocks, and pairs of texts."""
    folder = tmp_path_factory.mktemp("texts")
    numbers = " and ".join(str(n**3) for n in range(500))
    (folder / "text").write_text(numbers)
    for name, numbers in (("train", range(60)), ("test", range(100, 112))):
        rows = [f"what is {i} and {i}?,it is {2 * i}" for i in numbers]
        (folder / f"{name}.csv").write_text("\n".join(["prompt,answer", *rows]))
    return folder


def toy(recipe, texts):
    where = texts / "text" if recipe == "llama_1b_dpsgd" else texts
    return f"--config=configs/{recipe}.py:toy,{where}"


@pytest.mark.parametrize("recipe", TOYS)
def test_what_is_larger_than_a_device_runs_at_toy_size(recipe, texts, tmp_path):
    assert main([toy(recipe, texts), f"--workdir={tmp_path}"]) == 0
    ledger = (tmp_path / "ledger.txt").read_text().splitlines()
    assert [line.split()[2] for line in ledger] == [TOYS[recipe]] * 4
    assert (tmp_path / "export").is_dir()


def test_its_plan_tells_what_each_device_holds(texts, capsys):
    assert main([toy("llama_1b_dpsgd", texts), "--config.run.dry_run=True"]) == 0
    assert re.search(r"each device .* temporaries .*8 devices", capsys.readouterr().out)


@pytest.mark.parametrize("recipe", TOYS)
def test_its_launch_commands_are_understood(recipe):
    """Those in the docstring, with names for what stands for something."""
    text = importlib.import_module(f"configs.{recipe}").__doc__.replace("\\\n", " ")
    commands = [line for line in text.splitlines() if "python -m launch" in line]
    assert len(commands) == 3
    for command in commands:
        _, _, _, scheduler, *words = shlex.split(command)
        words = words[: words.index("--")]
        words = [word.replace("$PWD", "/here").replace("IMAGE", "i") for word in words]
        words = [word.replace("CLAIM", "claim") for word in words]
        asked = launch.SCHEDULERS[scheduler]
        job, options, _ = launch.parse(asked.Options, [*words, "--", "true"])
        assert job.name in asked.render(job, options).text
