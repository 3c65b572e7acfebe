"""DP-SGD on MNIST with the tanh CNN of Papernot et al. 2020 (arXiv 2007.14191).

    python -m experiments.train --config=configs/mnist_convnet_dpsgd.py:PATH/mnist.npz \
        --workdir=DIR

PATH/mnist.npz has the layout of Keras' mnist.npz (x_train, y_train, x_test, y_test).
"""

from ml_collections import ConfigDict

from configs import common

RATE = 4096 / 60_000
STEPS = 900


def get_config(path: str = "mnist.npz") -> ConfigDict:
    """Return the recipe for the file at ``path``."""
    config = common.base()
    mnist = {"name": "dpjax.data.arrays:npz", "path": path}
    config.data = ConfigDict(
        {"source": {**mnist, "split": "train"}, "provenance": "private"}
    )
    config.evaluation = ConfigDict(
        {
            "source": {**mnist, "split": "test"},
            "provenance": "public",
            "metric": {"name": "dpjax.models.losses:accuracy"},
            "batch_size": 1000,
            "ema_decay": 0.98,
        }
    )
    config.model = ConfigDict(
        {
            "name": "dpjax.models.inputs:standardized",
            # Customary public constants of MNIST.
            "mean": (0.1307,),
            "std": (0.3081,),
            "model": {"name": "dpjax.models.convnet:tanh_cnn", "num_classes": 10},
        }
    )
    config.loss = ConfigDict(
        {"name": "dpjax.models.losses:classification", "label_smoothing": 0.0}
    )
    config.mechanism = common.dp_sgd(
        epsilon=3.0, delta=1e-5, clip_norm=0.1, rate=RATE, steps=STEPS
    )
    config.optimizer = ConfigDict(
        {
            "name": "dpjax.optimizers:sgdw",
            "learning_rate": {
                "name": "optax:linear_schedule",
                "init_value": 8.0,
                "end_value": 0.5,
                "transition_steps": STEPS,
            },
            "momentum": 0.9,
            "weight_decay": 5e-4,
        }
    )
    config.compute.physical_batch_size = 256
    config.run.log_every = 100
    config.run.eval_every = 100
    config.run.checkpoint_every = 300
    return config
