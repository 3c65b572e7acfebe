r"""DP-Adam of RoBERTa-base on SST-2, after Li et al. 2022 (arXiv 2110.05679).

    python -m experiments.train --config=configs/sst2_roberta.py:VARIANT,FOLDER --workdir=DIR

FOLDER holds train.tsv and dev.tsv of GLUE's SST-2 (columns sentence, label), RoBERTa's
tokenizer.json, and its weights, model.safetensors. Variants: ``infilling`` (all parameters;
"TEXT It was <mask>.", the classes are the tokens of " terrible" and " great"), ``full``
(all, with a fresh head), ``lora`` (attention, rank 8, and the head), ``bitfit`` (biases and
the head).

From the paper's code: batches of 1000 expected, 3 epochs, learning rate 5e-4 with linear
decay, clip norm 0.1, epsilon 3. Delta 1e-6 (the paper: about 1e-5), 128 tokens instead of
256, and the learning rates of ``lora`` and ``bitfit`` are ours; so are the names in
``skip``, and the two label tokens, which were not checked against the files. Not run here:
no network brings the weights. The paper's fill-in variant is 3 to 5 points better than
``full``.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("infilling", "full", "lora", "bitfit")
EXAMPLES = 67_349
STEPS = 3 * EXAMPLES // 1000
RATES = {"infilling": 5e-4, "full": 5e-4, "lora": 2e-3, "bitfit": 5e-3}
MASK, LABELS = 50_264, (6587, 372)


def get_config(argument: str = "infilling") -> ConfigDict:
    """Return the recipe ``VARIANT[,FOLDER]``."""
    variant, folder = common.split_argument(argument, variants=VARIANTS, folder="sst2")
    fills = variant == "infilling"
    config = common.base()
    asks = (" It was", "<mask>", ".") if fills else ()
    sentences = {
        "name": "dpjax.data.text:labelled_texts",
        "delimiter": "\t",
        "columns": (),
        "template": ("<s>", "{sentence}", *asks, "</s>"),
        "label": "label",
        "length": 128,
        "tokenizer": {
            "name": "dpjax.data.tokenizers:from_file",
            "path": f"{folder}/tokenizer.json",
        },
    }
    config.data = ConfigDict(
        {
            "source": {**sentences, "path": f"{folder}/train.tsv"},
            "provenance": "private",
        }
    )
    config.evaluation = ConfigDict(
        {
            "source": {**sentences, "path": f"{folder}/dev.tsv"},
            "provenance": "public",
            "metric": {"name": "dpjax.models.losses:accuracy"},
            "batch_size": 64,
            "ema_decay": 0.0,
        }
    )
    encoder = {
        "name": "dpjax.models.bert:roberta_base",
        "vocab_size": 50265,
        "length": 512,
        "dtype": "bfloat16",
        "scan": True,
        "remat": False,
    }
    model = {
        "name": "dpjax.models.bert:classifier",
        "encoder": encoder,
        "num_classes": 2,
    }
    if fills:
        model = {
            "name": "dpjax.models.bert:infilling",
            "encoder": encoder,
            "mask_token": MASK,
            "label_tokens": LABELS,
        }
    model = {
        "name": "dpjax.models.weights:pretrained",
        "model": model,
        "path": folder,
        "family": "roberta",
        "fresh": () if fills else ("head/.*",),
        "skip": () if fills else ("lm_head.*",),
    }
    train: tuple[str, ...] = (".*",)
    if variant == "lora":
        model = {
            "name": "dpjax.models.peft:lora",
            "model": model,
            "rank": 8,
            "scale": 2.0,
            "targets": (".*attention/(query|value)",),
        }
        train = (common.ADAPTERS, "head/.*")
    if variant == "bitfit":
        train = (common.BIASES, "head/.*")
    config.model = ConfigDict(model)
    config.parameters = ConfigDict({"train": train, "provenance": "public"})
    config.loss = ConfigDict(
        {"name": "dpjax.models.losses:classification", "label_smoothing": 0.0}
    )
    config.mechanism = common.dp_sgd(
        epsilon=3.0, delta=1e-6, clip_norm=0.1, rate=1000 / EXAMPLES, steps=STEPS
    )
    config.optimizer = ConfigDict(
        {
            "name": "optax:adam",
            "learning_rate": {
                "name": "optax:linear_schedule",
                "init_value": RATES[variant],
                "end_value": 0.0,
                "transition_steps": STEPS,
            },
        }
    )
    config.compute.physical_batch_size = 64
    return config
