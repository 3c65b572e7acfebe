"""DP-SGD on scikit-learn's digits with a clip norm that follows the median gradient norm.

    python -m experiments.train --config=configs/digits_mlp_adaptive.py --workdir=DIR

The first clip norm is ten times too large on purpose; ``clip_norm`` in the log shows it fall.
"""

from ml_collections import ConfigDict, config_dict

from configs import digits_mlp_dpsgd


def get_config() -> ConfigDict:
    """Return the recipe."""
    config = digits_mlp_dpsgd.get_config()
    config.mechanism = ConfigDict(
        {
            "name": "dpjax.mechanisms.adaptive_dp_sgd:AdaptiveDpSgd",
            "initial_clip_norm": 10.0,
            "min_clip_norm": 1e-3,
            "max_clip_norm": 100.0,
            "target_quantile": 0.5,
            "clip_learning_rate": 0.2,
            "count_share": 0.02,
            "epsilon": 3.0,
            "noise_multiplier": config_dict.placeholder(float),
            "sampling": config.mechanism.sampling,
            "steps": config.mechanism.steps,
            "delta": config.mechanism.delta,
        }
    )
    return config
