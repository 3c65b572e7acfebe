"""DP-SGD of a byte-level GPT from scratch; one record is a block of 128 bytes of a text.

    python -m experiments.train --config=configs/shakespeare_gpt.py:PATH/tinyshakespeare.txt \
        --workdir=DIR

The guarantee is for one block of 128 bytes. 4 layers of width 256, epsilon 8, delta 1e-5.
Not run here: by its FLOPs some 7 hours on 2 CPU cores.
"""

from ml_collections import ConfigDict

from configs import common

STEPS = 1000


def get_config(path: str = "tinyshakespeare.txt") -> ConfigDict:
    """Return the recipe for the text at ``path``."""
    config = common.base()
    text = {
        "name": "dpjax.data.text:text_blocks",
        "path": path,
        "length": 128,
        "tokenizer": {"name": "dpjax.data.tokenizers:byte_level", "specials": ()},
    }
    config.data = ConfigDict(
        {"source": {**text, "start": 0.0, "stop": 0.9}, "provenance": "private"}
    )
    config.evaluation = ConfigDict(
        {
            "source": {**text, "start": 0.9, "stop": 1.0},
            "provenance": "public",
            "metric": {"name": "dpjax.models.losses:token_nats"},
            "batch_size": 64,
            "ema_decay": 0.99,
        }
    )
    config.model = ConfigDict(
        {
            "name": "dpjax.models.gpt2:gpt2",
            "vocab_size": 256,
            "length": 128,
            "layers": 4,
            "width": 256,
            "heads": 4,
            "dtype": "float32",
            "scan": False,
            "remat": False,
        }
    )
    config.loss = ConfigDict({"name": "dpjax.models.losses:causal_lm"})
    config.mechanism = common.dp_sgd(
        epsilon=8.0, delta=1e-5, clip_norm=0.1, rate=512 / 7843, steps=STEPS
    )
    config.optimizer = common.adam(1e-3)
    config.compute.physical_batch_size = 64
    return config
