"""BandMF (DP-FTRL) on scikit-learn's digits: noise that later steps partly take back.

python -m experiments.train --config=configs/digits_mlp_bandmf.py --workdir=DIR
"""

from ml_collections import ConfigDict, config_dict

from configs import digits_mlp_dpsgd

BANDS = 4


def get_config() -> ConfigDict:
    """Return the recipe."""
    config = digits_mlp_dpsgd.get_config()
    config.mechanism = ConfigDict(
        {
            "name": "dpjax.mechanisms.band_mf:BandMf",
            "clip_norm": 1.0,
            "clip_style": "flat",
            "epsilon": 3.0,
            "noise_multiplier": config_dict.placeholder(float),
            "bands": BANDS,
            "strategy": "mean_error",
            "sampling": {
                "name": "dpjax.sampling:CyclicPoisson",
                "cycle": BANDS,
                "rate": 1.0,
            },
            "steps": 200,
            "delta": 1e-5,
        }
    )
    return config
