"""Pretraining with DP-SGD where no device holds the model: 1.1e9 parameters, fully sharded.

    python -m experiments.train --config=configs/llama_1b_dpsgd.py:full,FOLDER --workdir=DIR

FOLDER holds one version of a data set that TFDS has prepared as array_record, with the feature
``tokens``, int32[1024]; the guarantee is for one sequence. The shape is TinyLlama's (22 layers
of width 2048, 32,000 tokens). The plan is VaultGemma's (arXiv 2510.15001): 1024 tokens and
epsilon at most 2 at delta 1.1e-10; from memory, without the paper at hand: batches of 518,000,
100,000 steps, noise multiplier 0.614, and 13e12 tokens of data. By Poisson sampling these
numbers cost epsilon 1.72; the batches of one shape that the paper pads or truncates to cost
more. Clip norm and learning rate are ours. A source has at most 2**31 records: rate and data
are to be changed together.

One node of 8 GPUs holds a replica (``fsdp=8``), and ``data=None`` makes as many replicas as
there are nodes: 8 of them for

    python -m launch slurm --name=llama --directory=$PWD --hosts=8 --accelerator=gpu:h100 \
        --devices_per_process=8 -- python -m experiments.train --config=... --workdir=DIR
    python -m launch jobset --name=llama --directory=/app --hosts=8 --accelerator=gpu \
        --devices_per_process=8 --image=IMAGE --volume_claim=CLAIM -- ... --workdir=runs/llama
    python -m launch tpu --name=llama --directory=$PWD --hosts=16 --accelerator=tpu:v5p-128 \
        --project=PROJECT --zone=ZONE --runtime_version=VERSION -- ...

What a device holds says ``--config.run.dry_run=True``; what many would exchange,
experiments/results/scaling.md. Not run at this size: by its FLOPs, at 120 TFLOP/s of each of
64 GPUs, a step takes 10 minutes.

``toy,FILE`` takes the same way at width 32, on blocks of 64 bytes of a text file, over 8
devices (``JAX_NUM_CPU_DEVICES=8``): seconds, epsilon 8.
"""

from ml_collections import ConfigDict

from configs import common
from dpjax.parallel.rules import TRANSFORMER

VARIANTS = ("full", "toy")
SEQUENCES = 13_000_000_000_000 // 1024


def get_config(argument: str = "full") -> ConfigDict:
    """Return the recipe ``VARIANT[,FOLDER or FILE]``."""
    variant, where = common.split_argument(
        argument, variants=VARIANTS, folder="sequences"
    )
    full = variant == "full"
    config = common.base()
    train = _sequences(where, "train") if full else _blocks(where, 0.0, 0.9)
    held_out = _sequences(where, "test") if full else _blocks(where, 0.9, 1.0)
    config.data = ConfigDict({"source": train, "provenance": "private"})
    config.evaluation = ConfigDict(
        {
            "source": held_out,
            "provenance": "public",
            "metric": {"name": "dpjax.models.losses:token_nats"},
            "batch_size": 512 if full else 8,
            "ema_decay": 0.0,
        }
    )
    config.model = ConfigDict(
        {
            "name": "dpjax.models.llama:llama",
            "vocab_size": 32000 if full else 256,
            "length": 1024 if full else 64,
            "layers": 22 if full else 2,
            "width": 2048 if full else 32,
            "heads": 32 if full else 4,
            "kv_heads": 4 if full else 2,
            "hidden": 5632 if full else 64,
            "rotary_base": 1e4,
            "epsilon": 1e-5,
            "tied": False,
            "dtype": "bfloat16",
            "scan": True,
            "remat": True,
        }
    )
    config.loss = ConfigDict({"name": "dpjax.models.losses:causal_lm"})
    if full:
        config.mechanism = common.dp_sgd(
            epsilon=2.0,
            delta=1.1e-10,
            clip_norm=1.0,
            rate=518_000 / SEQUENCES,
            steps=100_000,
        )
        config.mechanism.epsilon = None
        config.mechanism.noise_multiplier = 0.614
    else:
        config.mechanism = common.dp_sgd(
            epsilon=8.0, delta=1e-5, clip_norm=1.0, rate=0.2, steps=4
        )
    config.optimizer = common.adam(1e-3)
    config.compute.physical_batch_size = 512 if full else 8
    config.mesh.fsdp = 8
    config.mesh.rules = TRANSFORMER
    config.run.eval_every = 1000 if full else 4
    return config


def _sequences(folder: str, split: str) -> dict[str, object]:
    return {
        "name": "dpjax.data.tfds:tfds_folder",
        "path": folder,
        "split": split,
        "features": ("tokens",),
        "in_memory": False,
    }


def _blocks(path: str, start: float, stop: float) -> dict[str, object]:
    return {
        "name": "dpjax.data.text:text_blocks",
        "path": path,
        "length": 64,
        "tokenizer": {"name": "dpjax.data.tokenizers:byte_level", "specials": ()},
        "start": start,
        "stop": stop,
    }
