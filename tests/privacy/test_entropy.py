"""Secrets for several purposes."""

import itertools

from dpjax.privacy.entropy import entropy


def test_secrets_of_one_seed_have_nothing_in_common():
    """Else the sampler's seed, or a public direction's, would tell the noise."""
    purposes = ("noise", "sampling", "loss", "init", "direction")
    pairs = itertools.product(purposes, (0, 1, 11, None))
    drawn = [entropy(purpose, seed=seed) for purpose, seed in pairs]
    assert len(set(drawn)) == len(drawn)
