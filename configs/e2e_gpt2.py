"""DP-Adam of GPT-2 on the E2E data, after Li et al. 2022 (arXiv 2110.05679).

    python -m experiments.train --config=configs/e2e_gpt2.py:VARIANT,FOLDER --workdir=DIR

FOLDER holds trainset.csv and devset.csv of E2E (columns mr, ref), GPT-2's tokenizer.json,
and its weights, model.safetensors. Variants: ``full``, ``lora`` (attention, rank 4),
``prefix`` (10 keys and values in each layer).

From the paper's code: batches of 1024 expected, learning rate 2e-3 without decay, clip norm
0.1, 10 epochs, 100 tokens, epsilon 8 at delta 8e-6. That the pair is split by a line break,
and the learning rate of ``lora`` and ``prefix``, are ours. Not run here: no network brings
the weights. BLEU of the paper's ``full``: 63.2 (read off a figure of its repository). At the
274 examples/s that fastDP reports for an A100, an epoch takes 2.6 minutes.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("full", "lora", "prefix")
EXAMPLES = 42_061


def get_config(argument: str = "full") -> ConfigDict:
    """Return the recipe ``VARIANT[,FOLDER]``."""
    variant, folder = common.split_argument(argument, variants=VARIANTS, folder="e2e")
    config = common.base()
    pairs = {
        "name": "dpjax.data.text:text_pairs",
        "delimiter": ",",
        "columns": (),
        "template": ("{mr}", "\n", "{ref}", "<|endoftext|>"),
        "target": 2,
        "length": 100,
        "tokenizer": {
            "name": "dpjax.data.tokenizers:from_file",
            "path": f"{folder}/tokenizer.json",
        },
    }
    config.data = ConfigDict(
        {
            "source": {**pairs, "path": f"{folder}/trainset.csv"},
            "provenance": "private",
        }
    )
    config.evaluation = ConfigDict(
        {
            "source": {**pairs, "path": f"{folder}/devset.csv"},
            "provenance": "public",
            "metric": {"name": "dpjax.models.losses:token_nats"},
            "batch_size": 64,
            "ema_decay": 0.0,
        }
    )
    model = {
        "name": "dpjax.models.weights:pretrained",
        "path": folder,
        "family": "gpt2",
        "fresh": (),
        "skip": (),
        "model": {
            "name": "dpjax.models.gpt2:gpt2_small",
            "vocab_size": 50257,
            "length": 1024,
            "dtype": "bfloat16",
            "scan": True,
            "remat": False,
        },
    }
    train = ".*"
    if variant == "lora":
        model = {
            "name": "dpjax.models.peft:lora",
            "model": model,
            "rank": 4,
            "scale": 8.0,
            "targets": (".*attention/(query|value)",),
        }
        train = common.ADAPTERS
    if variant == "prefix":
        model = {"name": "dpjax.models.peft:prefix", "model": model, "length": 10}
        train = common.PREFIXES
    config.model = ConfigDict(model)
    config.parameters = ConfigDict({"train": (train,), "provenance": "public"})
    config.loss = ConfigDict({"name": "dpjax.models.losses:causal_lm"})
    config.mechanism = common.dp_sgd(
        epsilon=8.0,
        delta=8e-6,
        clip_norm=0.1,
        rate=1024 / EXAMPLES,
        steps=10 * EXAMPLES // 1024,
    )
    config.optimizer = common.adam(2e-3)
    config.compute.physical_batch_size = 64
    config.run.eval_every = 100
    return config
