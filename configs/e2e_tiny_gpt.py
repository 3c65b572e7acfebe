"""From public text to private text without a download: a tiny GPT, Shakespeare, then E2E.

    python -m experiments.public_to_private --task=e2e --text=PATH/tinyshakespeare.txt \
        --data=PATH/e2e --workdir=DIR

runs the variants in turn; one alone, after the first command has made its vocabulary:

    python -m experiments.train --config=configs/e2e_tiny_gpt.py:lora,DIR --workdir=DIR/lora

``pretrain``: 2 layers of width 128 on Shakespeare, public. ``lora``: adapters of all linear
layers on the 4,672 pairs of E2E's devset.csv, private. ``nonprivate``: the same without
privacy, for comparison. DIR holds ``public.txt``, ``train.csv`` and ``test.csv`` (links)
and ``tokenizer.json``, learnt from the public text.

Minutes on a CPU; epsilon 8.00, delta 1e-5. Scores: experiments/results/public_to_private.md.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("pretrain", "lora", "nonprivate")
STEPS = 30


def get_config(argument: str = "lora") -> ConfigDict:
    """Return the recipe ``VARIANT[,FOLDER]``."""
    variant, folder = common.split_argument(
        argument, variants=VARIANTS, folder="runs/e2e"
    )
    config = common.base()
    config.loss = ConfigDict({"name": "dpjax.models.losses:causal_lm"})
    config.compute.physical_batch_size = 64
    gpt = {
        "name": "dpjax.models.gpt2:gpt2",
        "vocab_size": 1024,
        "length": 192,
        "layers": 2,
        "width": 128,
        "heads": 4,
        "dtype": "float32",
        "scan": False,
        "remat": False,
    }
    tokenizer = {
        "name": "dpjax.data.tokenizers:from_file",
        "path": f"{folder}/tokenizer.json",
    }
    metric = {"name": "dpjax.models.losses:token_nats"}
    if variant == "pretrain":
        common.read_text(
            config,
            path=f"{folder}/public.txt",
            length=192,
            tokenizer=tokenizer,
            metric=metric,
        )
        config.model = ConfigDict(gpt)
        config.mechanism = common.non_private(batch_size=32, steps=600, delta=1e-5)
        config.optimizer = common.adam(2e-3)
        return config
    pairs = {
        "name": "dpjax.data.text:text_pairs",
        "delimiter": ",",
        "columns": (),
        "template": ("{mr}", "\n", "{ref}", "<eos>"),
        "target": 2,
        "length": 176,
        "tokenizer": tokenizer,
    }
    private = variant == "lora"
    config.data = ConfigDict(
        {
            "source": {**pairs, "path": f"{folder}/train.csv"},
            "provenance": "private" if private else "public",
        }
    )
    config.evaluation = ConfigDict(
        {
            "source": {**pairs, "path": f"{folder}/test.csv"},
            "provenance": "public",
            "metric": metric,
            "batch_size": 64,
            "ema_decay": 0.9,
        }
    )
    config.model = ConfigDict(
        {
            "name": "dpjax.models.peft:lora",
            "rank": 8,
            "scale": 2.0,
            "targets": (".*(attention|mlp)/.*",),
            "model": {
                "name": "dpjax.models.weights:exported",
                "path": f"{folder}/pretrain/export",
                "fresh": (),
                "model": gpt,
            },
        }
    )
    config.parameters = ConfigDict(
        {"train": (common.ADAPTERS,), "provenance": "public"}
    )
    if private:
        config.mechanism = common.dp_sgd(
            epsilon=8.0, delta=1e-5, clip_norm=0.1, rate=256 / 4672, steps=STEPS
        )
    else:
        config.mechanism = common.non_private(batch_size=256, steps=STEPS, delta=1e-5)
    config.optimizer = common.adam(1e-2)
    config.run.eval_every = STEPS
    return config
