"""The groups that most recipes share. Recipes set the rest; nothing else is inherited."""

from typing import Any

from ml_collections import ConfigDict, config_dict

ADAPTERS = r".*/lora_[ab]"
"""Parameters of LoRA."""
PREFIXES = r".*/prefix_(key|value)"
"""Parameters of prefix tuning."""
BIASES = r"(.*/)?bias"
"""Every bias: BitFit."""
NORMS = r"(.*/)?\w*norm\w*/(scale|bias)"
"""Scale and bias of every norm: FiLM."""


def base() -> ConfigDict:
    """Return the groups ``parameters``, ``augment``, ``compute``, ``mesh`` and ``run``.

    All parameters start fresh and are trained.
    """
    config = ConfigDict()
    config.parameters = ConfigDict({"train": (".*",), "provenance": "fresh"})
    config.augment = ConfigDict(
        {"transform": {"name": "dpjax.data.augment:identity"}, "views": 1}
    )
    config.compute = ConfigDict(
        {
            "engine": "auto",
            "microbatch_size": config_dict.placeholder(int),
            "memory_budget": config_dict.placeholder(int),  # bytes; None: half of all
            "physical_batch_size": 256,
        }
    )
    config.mesh = ConfigDict(
        {
            "data": config_dict.placeholder(int),  # None: all devices
            "fsdp": 1,  # devices that share rows, and one copy of the parameters
            "model": 1,  # devices that share the products with a weight
            "rules": ((".*", "largest"),),  # which dimensions are split
        }
    )
    config.run = ConfigDict(
        {
            "seed": config_dict.placeholder(int),  # None: secrets from the OS
            "log_every": 50,
            "eval_every": 100,
            "checkpoint_every": 100,
            "keep_checkpoints": 2,
            "writers": (),  # besides JSONL: "tensorboard", "wandb"
            "log_sensitive": False,
            "verify": True,
            "self_check": False,
            "dry_run": False,
        }
    )
    return config


def dp_sgd(
    *,
    epsilon: float,
    delta: float,
    clip_norm: float,
    rate: float,
    steps: int,
) -> ConfigDict:
    """Return the group ``mechanism`` of DP-SGD with Poisson sampling, calibrated."""
    return ConfigDict(
        {
            "name": "dpjax.mechanisms:DpSgd",
            "clip_norm": clip_norm,
            "clip_style": "flat",
            "epsilon": epsilon,
            "noise_multiplier": config_dict.placeholder(float),
            "sampling": {"name": "dpjax.privacy:Poisson", "rate": rate},
            "steps": steps,
            "delta": delta,
        }
    )


def non_private(*, batch_size: int, steps: int, delta: float) -> ConfigDict:
    """Return the group ``mechanism`` of ordinary training in shuffled batches."""
    return ConfigDict(
        {
            "name": "dpjax.mechanisms:NonPrivate",
            "sampling": {
                "name": "dpjax.privacy:ShuffledFixed",
                "batch_size": batch_size,
            },
            "steps": steps,
            "delta": delta,
        }
    )


def read_text(
    config: ConfigDict,
    *,
    path: str,
    length: int,
    tokenizer: dict[str, Any],
    metric: dict[str, Any],
) -> None:
    """Set ``data`` and ``evaluation`` to blocks of a public text, the last 5% held out."""
    text = {
        "name": "dpjax.data.text:text_blocks",
        "path": path,
        "length": length,
        "tokenizer": tokenizer,
    }
    config.data = ConfigDict(
        {"source": {**text, "start": 0.0, "stop": 0.95}, "provenance": "public"}
    )
    config.evaluation = ConfigDict(
        {
            "source": {**text, "start": 0.95, "stop": 1.0},
            "provenance": "public",
            "metric": metric,
            "batch_size": 64,
            "ema_decay": 0.0,
        }
    )


def adam(learning_rate: float) -> ConfigDict:
    """Return the group ``optimizer`` of Adam with a constant learning rate."""
    return ConfigDict({"name": "optax:adam", "learning_rate": learning_rate})


def split_argument(
    argument: str, *, variants: tuple[str, ...], folder: str
) -> tuple[str, str]:
    """Return variant and folder of ``VARIANT[,FOLDER]``; ``folder`` if none is given.

    Raises:
        ValueError: If there is no such variant.
    """
    variant, _, given = argument.partition(",")
    if variant not in variants:
        raise ValueError(f"variant={variant!r} is unknown; use {', '.join(variants)}")
    return variant, given or folder
