"""DP-SGD on scikit-learn's digits with a clip norm and a noise that fall with the steps.

    python -m experiments.train --config=configs/digits_mlp_scheduled.py --workdir=DIR

Both are public functions of the step, any optax schedules; each step is accounted with its own
noise multiplier, and ``epsilon`` sets the one that a scale of 1 means.

Seconds on a CPU; epsilon 3.00, delta 1e-5.
"""

from ml_collections import ConfigDict, config_dict

from configs import digits_mlp_dpsgd


def get_config() -> ConfigDict:
    """Return the recipe."""
    config = digits_mlp_dpsgd.get_config()
    steps = config.mechanism.steps
    config.mechanism = ConfigDict(
        {
            "name": "dpjax.mechanisms:ScheduledDpSgd",
            "clip_schedule": {
                "name": "optax:linear_schedule",
                "init_value": 1.0,
                "end_value": 0.5,
                "transition_steps": steps,
            },
            "noise_schedule": {
                "name": "optax:linear_schedule",
                "init_value": 1.2,
                "end_value": 0.8,
                "transition_steps": steps,
            },
            "epsilon": 3.0,
            "noise_multiplier": config_dict.placeholder(float),
            "sampling": config.mechanism.sampling,
            "steps": steps,
            "delta": config.mechanism.delta,
        }
    )
    return config
