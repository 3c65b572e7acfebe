"""From public text to private labels without a download: a tiny encoder, then SST-2.

    python -m experiments.public_to_private --task=sst2 --text=PATH/tinyshakespeare.txt \
        --data=PATH/sst2 --workdir=DIR

runs the variants in turn; one alone, after the first command has made its vocabulary:

    python -m experiments.train --config=configs/sst2_tiny_encoder.py:private,DIR \
        --workdir=DIR/private

``pretrain``: one layer of width 64 fills in masked tokens of Shakespeare, public.
``private``: the token table, on the 6,920 sentences of SST-2 as private data; the classes
are a fixed linear map, drawn at random, of the mean over the encoder's outputs, so that
each token moves them on its own. At a mask ("It was <mask>.") this encoder says the same
whatever the sentence, and what all gradients share there buries the rest under the noise.
``nonprivate``: the same without privacy, for comparison. DIR holds ``public.txt``,
``train.tsv`` and ``test.tsv`` (links) and ``tokenizer.json``, learnt from the public text.

Two minutes on two CPU cores; epsilon 8.00, delta 1e-5; accuracy 0.636 (untouched 0.499,
without privacy 0.710), and runs differ by several points. More:
experiments/results/public_to_private.md.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("pretrain", "private", "nonprivate")
STEPS = 80
MASK = 1  # the second special token of the vocabulary


def get_config(argument: str = "private") -> ConfigDict:
    """Return the recipe ``VARIANT[,FOLDER]``."""
    variant, folder = common.split_argument(
        argument, variants=VARIANTS, folder="runs/sst2"
    )
    config = common.base()
    config.compute.physical_batch_size = 64
    encoder = {
        "name": "dpjax.models.bert:Encoder",
        "vocab_size": 4096,
        "length": 64,
        "first_position": 0,
        "segments": 1,
        "layers": 1,
        "width": 64,
        "heads": 4,
        "hidden": 256,
        "epsilon": 1e-5,
        "dtype": "float32",
        "scan": False,
        "remat": False,
    }
    tokenizer = {
        "name": "dpjax.data.tokenizers:from_file",
        "path": f"{folder}/tokenizer.json",
    }
    if variant == "pretrain":
        hidden = {"mask_token": MASK, "rate": 0.15}
        common.read_text(
            config,
            path=f"{folder}/public.txt",
            length=64,
            tokenizer=tokenizer,
            metric={"name": "dpjax.models.losses:hidden_token_nats", **hidden},
        )
        config.model = ConfigDict(
            {"name": "dpjax.models.bert:masked_lm", "encoder": encoder}
        )
        config.loss = ConfigDict({"name": "dpjax.models.losses:masked_lm", **hidden})
        config.compute.physical_batch_size = 32
        config.mechanism = common.non_private(batch_size=32, steps=400, delta=1e-5)
        config.optimizer = common.adam(3e-3)
        config.run.eval_every = 200
        return config
    sentences = {
        "name": "dpjax.data.text:labelled_texts",
        "delimiter": "\t",
        "columns": ("sentence", "label"),
        "template": ("{sentence}",),
        "label": "label",
        "length": 64,
        "tokenizer": tokenizer,
    }
    private = variant == "private"
    config.data = ConfigDict(
        {
            "source": {**sentences, "path": f"{folder}/train.tsv"},
            "provenance": "private" if private else "public",
        }
    )
    config.evaluation = ConfigDict(
        {
            "source": {**sentences, "path": f"{folder}/test.tsv"},
            "provenance": "public",
            "metric": {"name": "dpjax.models.losses:accuracy"},
            "batch_size": 64,
            "ema_decay": 0.0,
        }
    )
    config.model = ConfigDict(
        {
            "name": "dpjax.models.weights:exported",
            "path": f"{folder}/pretrain/export",
            "fresh": ("head/.*",),
            "model": {
                "name": "dpjax.models.bert:mean_classifier",
                "encoder": encoder,
                "num_classes": 2,
            },
        }
    )
    config.parameters = ConfigDict(
        {"train": ("token/embedding",), "provenance": "public"}
    )
    config.loss = ConfigDict(
        {"name": "dpjax.models.losses:classification", "label_smoothing": 0.0}
    )
    if private:
        config.mechanism = common.dp_sgd(
            epsilon=8.0, delta=1e-5, clip_norm=0.05, rate=1024 / 6920, steps=STEPS
        )
    else:
        config.mechanism = common.non_private(batch_size=1024, steps=STEPS, delta=1e-5)
    config.optimizer = common.adam(0.15)
    return config
