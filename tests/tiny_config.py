"""Twelve cheap steps on digits, from a fixed seed: a config for tests."""

from ml_collections import ConfigDict

from configs import digits_mlp_dpsgd


def get_config(variant: str = "dpsgd") -> ConfigDict:
    """Return digits_mlp_dpsgd, its non-private twin or one with error memory, made small."""
    memory = variant == "dicesgd"
    config = digits_mlp_dpsgd.get_config("dpsgd" if memory else variant)
    if variant in ("dpsgd", "dicesgd"):
        config.mechanism.epsilon = None
        config.mechanism.noise_multiplier = 4.0
        config.mechanism.sampling.rate = 0.1
    if memory:
        config.mechanism.name = "dpjax.mechanisms:DiceSgd"
        config.mechanism.error_clip_norm = 1.0
        config.mechanism.error_scale = "sum"
        config.mechanism.outer_norm = None
        config.mechanism.accounting = "conservative"
    config.mechanism.steps = 12
    config.model.features = (8,)
    config.compute.physical_batch_size = 64
    config.mesh.data = 1
    config.run.seed = 1
    config.run.log_every = 6
    config.run.eval_every = 6
    config.run.checkpoint_every = 4
    config.run.verify = False  # one program less to compile
    return config
