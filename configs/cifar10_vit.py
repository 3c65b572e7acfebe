"""Few-shot DP-Adam of a pretrained ViT-B/16 on CIFAR-10, after Tobaben et al. 2023.

    python -m experiments.train --config=configs/cifar10_vit.py:VARIANT,FOLDER --workdir=DIR

FOLDER is an image folder (train/<class>/*, test/<class>/*) that also holds the weights,
model.safetensors, of a ViT-B/16 of 224 x 224 pixels trained on ImageNet-21k. Variants:
``head``, ``film`` (scale and bias of every norm, and the head), ``all``. Shots for each class:
--config.data.source.per_class=S; then --config.mechanism.delta is to stay below 1/(10 S).

The parts that are trained, Adam, and delta of about 1/n are from the paper (arXiv
2302.01190), which tunes the rest; batch, steps, clip norm and learning rates here are ours.
Not run here: no network brings the weights (name a pooler of the file in ``skip``).
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("film", "head", "all")
SHOTS = 100
TRAIN = {
    "head": ("head/.*",),
    "film": (common.NORMS, "head/.*"),
    "all": (".*",),
}
RATES = {"head": 1e-2, "film": 3e-3, "all": 3e-4}


def get_config(argument: str = "film") -> ConfigDict:
    """Return the recipe ``VARIANT[,FOLDER]``."""
    variant, folder = common.split_argument(
        argument, variants=VARIANTS, folder="cifar10"
    )
    config = common.base()
    images = {
        "name": "dpjax.data.images:image_folder",
        "path": folder,
        "cache": f"{folder}/.dpjax_cache",
    }
    config.data = ConfigDict(
        {
            "source": {
                "name": "dpjax.data.arrays:few_shots",
                "source": {**images, "split": "train"},
                "per_class": SHOTS,
            },
            "provenance": "private",
        }
    )
    config.evaluation = ConfigDict(
        {
            "source": {**images, "split": "test"},
            "provenance": "public",
            "metric": {"name": "dpjax.models.losses:accuracy"},
            "batch_size": 100,
            "ema_decay": 0.0,
        }
    )
    vit = {
        "name": "dpjax.models.vit:vit_b16",
        "num_classes": 10,
        "image_size": 224,
        "dtype": "bfloat16",
        "scan": True,
        "remat": False,
    }
    weights = {
        "name": "dpjax.models.weights:pretrained",
        "model": vit,
        "path": folder,
        "family": "vit",
        "fresh": ("head/.*",),
        "skip": (),
    }
    config.model = ConfigDict(
        {
            "name": "dpjax.models.inputs:standardized",
            "mean": (0.5, 0.5, 0.5),  # of the pretrained network
            "std": (0.5, 0.5, 0.5),
            "model": {
                "name": "dpjax.models.inputs:resized",
                "size": 224,
                "model": weights,
            },
        }
    )
    config.parameters = ConfigDict({"train": TRAIN[variant], "provenance": "public"})
    config.loss = ConfigDict(
        {"name": "dpjax.models.losses:classification", "label_smoothing": 0.0}
    )
    config.mechanism = common.dp_sgd(
        epsilon=8.0, delta=5e-4, clip_norm=1.0, rate=0.5, steps=100
    )
    config.optimizer = common.adam(RATES[variant])
    config.compute.physical_batch_size = 32
    return config
