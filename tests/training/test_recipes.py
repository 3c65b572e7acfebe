"""Recipes of fine-tuning whose data and weights no network brings here.

What each variant trains is checked on its model in full size, by shapes alone.
"""

import importlib

import jax
import numpy as np
import pytest

from dpjax.models.partition import partition
from dpjax.training.config import WEIGHTS, build
from experiments.train import main

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
