"""Few-shot DP-Adam on five classes of CIFAR-10, from a network of the five other classes.

Nothing is downloaded but CIFAR-10 itself. Every other class in alphabetical order, from
airplane on, is declared public, the others are private. FOLDER (here runs/few_shot) holds
them as two image folders; links to the class folders do:

    for split in train test; do
      mkdir -p runs/few_shot/{public,private}/$split
      for class in airplane bird deer frog ship; do
        ln -s CIFAR10/$split/$class runs/few_shot/public/$split/; done
      for class in automobile cat dog horse truck; do
        ln -s CIFAR10/$split/$class runs/few_shot/private/$split/; done
    done
    python -m experiments.train --config=configs/cifar10_few_shot.py:pretrain,runs/few_shot \
        --workdir=runs/few_shot/pretrain
    python -m experiments.train --config=configs/cifar10_few_shot.py:film,runs/few_shot \
        --workdir=DIR

``pretrain``: all 25,000 public images, a small CNN with GroupNorm that sees 16 x 16
pixels. ``head``, ``film`` (scale and bias of every norm, and the head), ``all``: the first
25 images of each private class. 5 minutes on a CPU core, then half a minute; epsilon 8.00,
delta 1e-4. The grid of shots, epsilons and parts is experiments/sweeps/few_shot.py.

The parts that are trained and the question are from Tobaben et al. 2023 (arXiv 2302.01190),
who start from ImageNet-21k. Both halves are of one data set, taken the same way: a public
set is seldom that near to the private one.
"""

from ml_collections import ConfigDict

from configs import common
from configs.cifar10_vit import TRAIN

VARIANTS = ("pretrain", "head", "film", "all")
CLASSES, SHOTS, STEPS, DELTA = 5, 25, 30, 1e-4
RATES = {"head": 3e-2, "film": 1e-2, "all": 2e-3}


def get_config(argument: str = "film") -> ConfigDict:
    """Return the recipe ``VARIANT[,FOLDER]``."""
    variant, folder = common.split_argument(
        argument, variants=VARIANTS, folder="runs/few_shot"
    )
    config = common.base()
    half = "public" if variant == "pretrain" else "private"
    images = {
        "name": "dpjax.data.images:image_folder",
        "path": f"{folder}/{half}",
        "cache": f"{folder}/.dpjax_cache",
    }
    config.evaluation = ConfigDict(
        {
            "source": {**images, "split": "test"},
            "provenance": "public",
            "metric": {"name": "dpjax.models.losses:accuracy"},
            "batch_size": 250,
            "ema_decay": 0.99 if variant == "pretrain" else 0.0,
        }
    )
    config.loss = ConfigDict(
        {"name": "dpjax.models.losses:classification", "label_smoothing": 0.0}
    )
    network = {"name": "dpjax.models.convnet:groupnorm_cnn", "num_classes": CLASSES}
    if variant == "pretrain":
        config.data = ConfigDict(
            {"source": {**images, "split": "train"}, "provenance": "public"}
        )
        config.model = ConfigDict(seen(network))
        config.mechanism = common.non_private(batch_size=100, steps=1500, delta=DELTA)
        config.optimizer = common.adam(2e-3)
        config.compute.physical_batch_size = 100
        config.run.eval_every = config.run.checkpoint_every = 500
        return config
    source = {
        "name": "dpjax.data.arrays:few_shots",
        "source": {**images, "split": "train"},
        "per_class": SHOTS,
    }
    config.data = ConfigDict({"source": source, "provenance": "private"})
    start = {
        "name": "dpjax.models.weights:exported",
        "path": f"{folder}/pretrain/export",
        "fresh": ("head/.*",),
    }
    config.model = ConfigDict(seen({**start, "model": network}))
    config.parameters = ConfigDict({"train": TRAIN[variant], "provenance": "public"})
    config.mechanism = full_batch(8.0)
    config.optimizer = common.adam(RATES[variant])
    config.compute.physical_batch_size = CLASSES * SHOTS
    return config


def full_batch(epsilon: float) -> ConfigDict:
    """Return the group ``mechanism`` of DP-GD, calibrated."""
    mechanism = common.dp_sgd(
        epsilon=epsilon, delta=DELTA, clip_norm=0.5, rate=1.0, steps=STEPS
    )
    mechanism.sampling = ConfigDict({"name": "dpjax.privacy:FullBatch"})
    return mechanism


def seen(network: dict) -> dict:
    """Return the model that sees 16 x 16 standardised pixels."""
    return {
        "name": "dpjax.models.inputs:standardized",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "model": {"name": "dpjax.models.inputs:resized", "size": 16, "model": network},
    }
