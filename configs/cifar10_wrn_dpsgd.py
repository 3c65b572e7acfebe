"""DP-SGD on CIFAR-10 with a wide ResNet, after De et al. 2022 (arXiv 2204.13650).

    python -m experiments.train --config=configs/cifar10_wrn_dpsgd.py:PATH \
        --workdir=DIR

PATH is an image folder: PATH/train/<class>/*.jpg and PATH/test/<class>/*.jpg.

From the paper: WRN-16-4 with GroupNorm and weight standardisation, 16 augmentations of each
image averaged before clipping, batches of 4096, clip norm 1, no momentum, a moving average of
the parameters, epsilon 8 at delta 1e-5. The number of steps and the learning rate are ours to
check: this recipe has not been run to its end (see experiments/results/README.md).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(path: str = "cifar10") -> ConfigDict:
    """Return the recipe for the image folder at ``path``."""
    config = common.base()
    cifar = {
        "name": "dpjax.data.images:image_folder",
        "path": path,
        "cache": f"{path}/.dpjax_cache",
    }
    config.data = ConfigDict(
        {"source": {**cifar, "split": "train"}, "provenance": "private"}
    )
    config.evaluation = ConfigDict(
        {
            "source": {**cifar, "split": "test"},
            "provenance": "public",
            "metric": {"name": "dpjax.models.losses:accuracy"},
            "batch_size": 500,
            "ema_decay": 0.9999,
        }
    )
    config.model = ConfigDict(
        {
            "name": "dpjax.models.inputs:standardized",
            # Customary public constants of CIFAR-10.
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2470, 0.2435, 0.2616),
            "model": {
                "name": "dpjax.models.wide_resnet:wide_resnet",
                "depth": 16,
                "width": 4,
                "num_classes": 10,
                "groups": 16,
                "weight_standardization": True,
                "dtype": "float32",
            },
        }
    )
    config.loss = ConfigDict(
        {"name": "dpjax.models.losses:classification", "label_smoothing": 0.0}
    )
    config.augment = ConfigDict(
        {
            "transform": {"name": "dpjax.data.augment:flip_and_crop", "padding": 4},
            "views": 16,
        }
    )
    config.mechanism = common.dp_sgd(
        epsilon=8.0, delta=1e-5, clip_norm=1.0, rate=4096 / 50_000, steps=2000
    )
    config.optimizer = ConfigDict({"name": "optax:sgd", "learning_rate": 2.0})
    config.compute.physical_batch_size = 64
    config.run.eval_every = 250
    config.run.checkpoint_every = 250
    return config
