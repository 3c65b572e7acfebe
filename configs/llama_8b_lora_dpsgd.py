r"""DP-SGD of adapters of Llama 3 8B on private pairs of texts; the base fully sharded.

    python -m experiments.train --config=configs/llama_8b_lora_dpsgd.py:full,FOLDER \
        --workdir=DIR

FOLDER holds train.csv and test.csv (columns prompt, answer), tokenizer.json and the weights of
Llama 3 8B in the Hugging Face layout, which come with a licence of their own. LoRA of rank 16
on all products of attention and MLP (41.9e6 parameters); epsilon 8 at delta 1e-6 for one of
100,000 pairs, whose number and rate are to be set. Learning rate, clip norm and rank are ours.
Not run at this size.

8 GPUs of one node hold the base in parts of 4 GB (``fsdp=8``); ``data=None`` makes one replica
of each node. On two nodes, a JobSet, or a TPU slice:

    python -m launch slurm --name=lora --directory=$PWD --hosts=2 --accelerator=gpu:h100 \
        --devices_per_process=8 -- python -m experiments.train --config=... --workdir=DIR
    python -m launch jobset --name=lora --directory=/app --hosts=2 --accelerator=gpu \
        --devices_per_process=8 --image=IMAGE --volume_claim=CLAIM -- ... --workdir=runs/lora
    python -m launch tpu --name=lora --directory=$PWD --hosts=4 --accelerator=tpu:v5p-32 \
        --project=PROJECT --zone=ZONE --runtime_version=VERSION -- ...

Compiled for 8 and 64 devices ``auto`` has 1.00 of the FLOPs and of the traffic of training
without privacy, and 1.02 of its memory: experiments/results/scaling.md.

``toy,FOLDER`` takes the same way at width 32 with bytes for tokens, from fresh weights, on
2x2x2 devices (``JAX_NUM_CPU_DEVICES=8``), heads and hidden axes split: seconds.
"""

from ml_collections import ConfigDict

from configs import common
from dpjax.parallel.rules import TRANSFORMER

VARIANTS = ("full", "toy")


def get_config(argument: str = "full") -> ConfigDict:
    """Return the recipe ``VARIANT[,FOLDER]``."""
    variant, folder = common.split_argument(
        argument, variants=VARIANTS, folder="llama3"
    )
    full = variant == "full"
    config = common.base()
    tokenizer = {"name": "dpjax.data.tokenizers:byte_level", "specials": ("<eos>",)}
    if full:
        tokenizer = {
            "name": "dpjax.data.tokenizers:from_file",
            "path": f"{folder}/tokenizer.json",
        }
    pairs = {
        "name": "dpjax.data.text:text_pairs",
        "delimiter": ",",
        "columns": (),
        "template": (
            "{prompt}",
            "\n",
            "{answer}",
            "<|end_of_text|>" if full else "<eos>",
        ),
        "target": 2,
        "length": 1024 if full else 32,
        "tokenizer": tokenizer,
    }
    config.data = ConfigDict(
        {"source": {**pairs, "path": f"{folder}/train.csv"}, "provenance": "private"}
    )
    config.evaluation = ConfigDict(
        {
            "source": {**pairs, "path": f"{folder}/test.csv"},
            "provenance": "public",
            "metric": {"name": "dpjax.models.losses:token_nats"},
            "batch_size": 64 if full else 8,
            "ema_decay": 0.0,
        }
    )
    llama = {
        "name": "dpjax.models.llama:llama",
        "vocab_size": 128256 if full else 257,
        "length": 1024 if full else 32,
        "layers": 32 if full else 2,
        "width": 4096 if full else 32,
        "heads": 32 if full else 4,
        "kv_heads": 8 if full else 2,
        "hidden": 14336 if full else 64,
        "rotary_base": 5e5,
        "epsilon": 1e-5,
        "tied": False,
        "dtype": "bfloat16",
        "scan": True,
        "remat": True,
    }
    pretrained = {
        "name": "dpjax.models.weights:pretrained",
        "path": folder,
        "family": "llama",
        "fresh": (),
        "skip": (),
        "model": llama,
    }
    config.model = ConfigDict(
        {
            "name": "dpjax.models.peft:lora",
            "rank": 16 if full else 4,
            "scale": 2.0,
            "targets": (".*(attention|mlp)/.*",),
            "model": pretrained if full else llama,
        }
    )
    config.parameters = ConfigDict(
        {"train": (common.ADAPTERS,), "provenance": "public" if full else "fresh"}
    )
    config.loss = ConfigDict({"name": "dpjax.models.losses:causal_lm"})
    config.mechanism = common.dp_sgd(
        epsilon=8.0,
        delta=1e-6 if full else 1e-5,
        clip_norm=1.0,
        rate=1024 / 100_000 if full else 0.2,
        steps=1000 if full else 4,
    )
    config.optimizer = common.adam(1e-3)
    config.compute.physical_batch_size = 64 if full else 8
    config.mesh.fsdp = 8 if full else 2
    config.mesh.model = 1 if full else 2
    config.mesh.rules = TRANSFORMER
    config.run.eval_every = 100 if full else 4
    return config
