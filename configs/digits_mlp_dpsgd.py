"""DP-SGD on scikit-learn's digits (ships inside the package): the smoke test of all.

    python -m experiments.train --config=configs/digits_mlp_dpsgd.py --workdir=DIR

Variants: ``:nonprivate`` trains the same model without privacy on data declared public.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "dpsgd") -> ConfigDict:
    """Return the recipe, or its non-private twin."""
    if variant not in ("dpsgd", "nonprivate"):
        raise ValueError(f"variant={variant!r} is unknown; use dpsgd or nonprivate")
    config = common.base()
    digits = {"name": "dpjax.data.arrays:digits", "test_fraction": 0.2}
    config.data = ConfigDict(
        {"source": {**digits, "split": "train"}, "provenance": "private"}
    )
    config.evaluation = ConfigDict(
        {
            "source": {**digits, "split": "test"},
            "provenance": "public",
            "metric": {"name": "dpjax.models.losses:accuracy"},
            "batch_size": 360,
            "ema_decay": 0.95,
        }
    )
    config.model = ConfigDict(
        {
            "name": "dpjax.models.mlp:mlp",
            "features": (64,),
            "num_classes": 10,
            "activation": "tanh",
        }
    )
    config.loss = ConfigDict(
        {"name": "dpjax.models.losses:classification", "label_smoothing": 0.0}
    )
    config.mechanism = common.dp_sgd(
        epsilon=3.0, delta=1e-5, clip_norm=1.0, rate=0.25, steps=200
    )
    config.optimizer = ConfigDict({"name": "optax:sgd", "learning_rate": 1.0})
    if variant == "nonprivate":
        config.data.provenance = "public"
        config.mechanism = ConfigDict(
            {
                "name": "dpjax.mechanisms:NonPrivate",
                "sampling": {"name": "dpjax.privacy:ShuffledFixed", "batch_size": 256},
                "steps": 200,
                "delta": 1e-5,
            }
        )
    return config
