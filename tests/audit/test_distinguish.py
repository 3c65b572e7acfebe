"""No attack beats a claim that ships; false claims and broken code are caught."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpjax
from dpjax.audit import distinguish, verdict
from dpjax.clipping import vmap
from dpjax.privacy.sampling import FullBatch, Poisson
from experiments.audits.settings import FALSE, SETTINGS
from tests.checks import thinned


def audit(mechanism, *, attack=None, trials=3000, **options):
    if attack is None:
        known = distinguish.attacks_on(mechanism)
        attack = "opposed" if "opposed" in known else "likelihood"
    (finding,) = verdict.audit_mechanism(
        mechanism, trials=trials, seed=1, confidence=0.99, attacks=[attack], **options
    )
    return finding


@pytest.mark.parametrize("name", thinned([(name,) for name in SETTINGS], 5))
def test_what_ships_is_consistent(name):
    finding = audit(SETTINGS[name])
    assert finding.verdict == "consistent", finding
    # An attack that sees nothing proves nothing.
    assert finding.posterior.median > 0.1 * verdict.claim_of(SETTINGS[name]).epsilon


@pytest.mark.parametrize("name", FALSE)
def test_false_claims_are_refuted(name):
    assert audit(FALSE[name]).verdict == "VIOLATED"


HONEST = dpjax.DpSgd(
    clip_norm=0.5,
    clip_style="flat",
    noise_multiplier=3.0,
    sampling=FullBatch(),
    steps=6,
    num_examples=2,
    delta=1e-3,
)
SAMPLED = dataclasses.replace(
    HONEST, sampling=Poisson(rate=0.5), noise_multiplier=3.0, num_examples=60, steps=12
)


class NoNoise(dpjax.DpSgd):
    def release(self, clipped, state, params, *, key, step):
        silent = dpjax.DpSgd(**vars(self) | {"noise_multiplier": 0.0})
        return silent.release(clipped, state, params, key=key, step=step)


class NoiseDividedTwice(dpjax.DpSgd):
    def release(self, clipped, state, params, *, key, step):
        less = self.noise_multiplier / self.expected_batch_size
        quiet = dpjax.DpSgd(**vars(self) | {"noise_multiplier": less})
        return quiet.release(clipped, state, params, key=key, step=step)


class KeyReused(dpjax.DpSgd):
    def release(self, clipped, state, params, *, key, step):
        return super().release(clipped, state, params, key=key, step=step % 3)


class TwiceTheRate(Poisson):
    def draw(self, step, *, num_examples, seed):
        twice = Poisson(rate=2 * self.rate)
        return twice.draw(step, num_examples=num_examples, seed=seed)


class UnaccountedTruncation(Poisson):
    def draw(self, step, *, num_examples, seed):
        drawn = super().draw(step, num_examples=num_examples, seed=seed)
        # Drawn in random order, so this is a uniform subset.
        return np.random.default_rng([seed, step]).permutation(drawn)[:26]


def clip_times_ten(loss, query, batch, key):
    wide = dataclasses.replace(query, clip_norm=10 * query.clip_norm)
    clipped, statistics = vmap(loss, wide, batch, key)
    return dataclasses.replace(clipped, l2_bound=query.l2_bound), statistics


def sums_shards_before_clipping(loss, query, batch, key):
    clipped, statistics = vmap(loss, query, batch, key)
    wide = dataclasses.replace(query, clip_norm=1e6)
    whole, _ = vmap(loss, wide, batch, key)
    norm = jnp.abs(whole.total["x"])
    factor = jnp.minimum(1.0, query.clip_norm / jnp.maximum(norm, 1e-12))
    total = jax.tree.map(lambda x: factor * x, whole.total)
    return dataclasses.replace(clipped, total=total), statistics


def as_(mutant, mechanism=HONEST):
    return mutant(**vars(mechanism))


MUTANTS = {
    "no noise": (as_(NoNoise), "likelihood", {}),
    "noise divided by the batch twice": (as_(NoiseDividedTwice), "likelihood", {}),
    "clip x10": (HONEST, "likelihood", {"engine": clip_times_ten}),
    "rate x2": (
        dataclasses.replace(SAMPLED, sampling=TwiceTheRate(rate=0.5)),
        "likelihood",
        {},
    ),
    "key reused": (as_(KeyReused), "reuse", {}),
    "truncation unaccounted": (
        dataclasses.replace(SAMPLED, sampling=UnaccountedTruncation(rate=0.5)),
        "opposed",
        {},
    ),
    "sum across shards before clipping": (
        HONEST,
        "opposed",
        {"engine": sums_shards_before_clipping},
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_flagged(name):
    mechanism, attack, options = MUTANTS[name]
    assert audit(mechanism, attack=attack, **options).verdict == "VIOLATED"


@pytest.mark.parametrize(
    ("mechanism", "attack"),
    [
        (HONEST, "likelihood"),
        (HONEST, "reuse"),
        (HONEST, "opposed"),
        (SAMPLED, "likelihood"),
        (SAMPLED, "opposed"),
    ],
)
def test_the_honest_code_passes_the_same_attacks(mechanism, attack):
    assert audit(mechanism, attack=attack).verdict == "consistent"


def test_the_audit_has_power():
    """Without subsampling at least 60 % of the claim is shown."""
    finding = audit(HONEST, trials=20000)
    claimed = verdict.claim_of(HONEST).epsilon
    assert 0.6 * claimed < finding.gdp_lower_bound < claimed


@pytest.mark.parametrize(
    ("mechanism", "options", "message"),
    [
        (HONEST, {"trials": 3}, "too few to refute epsilon"),
        (HONEST, {"attack": "likelyhood"}, "attack='likelyhood' is unknown"),
        (
            dataclasses.replace(HONEST, noise_multiplier=0.0),
            {"attack": "likelihood"},
            "epsilon=inf of DpSgd is no claim",
        ),
        (
            dataclasses.replace(HONEST, num_examples=100),
            {"attack": "opposed"},
            "at most 64 examples",
        ),
        (SETTINGS["Diff2"], {"attack": "reuse"}, "needs steps alike"),
        (
            dpjax.NonPrivate(sampling=FullBatch(), steps=1, num_examples=2, delta=0.1),
            {"attack": "likelihood"},
            "epsilon=inf of NonPrivate is no claim",
        ),
    ],
)
def test_wrong_input_is_refused(mechanism, options, message):
    with pytest.raises(ValueError, match=message):
        audit(mechanism, **options)


def test_a_mechanism_without_a_view_is_refused():
    with pytest.raises(ValueError, match="mechanism=int has no known attack"):
        distinguish.attacks_on(3)
