"""The checks a user can run on a config: what ships passes, what is broken is named."""

import dataclasses
import functools
import importlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpjax
import dpjax.privacy.noise
from dpjax.clipping import vmap
from dpjax.privacy import accounting
from dpjax.privacy.sampling import CyclicPoisson, FullBatch, Poisson, TruncatedPoisson
from dpjax.training import opening, report, train
from dpjax.training.experiment import build_experiment
from dpjax.training.verification import noises
from dpjax.training.verification import self_check as checks
from dpjax.training.verification.draws import check_accounting, check_draws
from dpjax.training.verification.noises import (
    _related,
    check_fresh,
    check_keys,
    check_moments,
)
from dpjax.training.verification.self_check import SelfCheckError, self_check
from tests.checks import thinned
from tests.contracts.test_mechanisms import PRIVATE
from tests.runs import tiny


@functools.cache
def experiment(variant="dpsgd"):
    return build_experiment(tiny(variant))


def broken(**changes):
    return dataclasses.replace(experiment(), **changes)


def mechanism_as(mutant):
    return broken(mechanism=mutant(**vars(experiment().mechanism)))


def test_a_plan_says_which_checks_were_passed():
    config = tiny(**{"run.self_check": True, "run.dry_run": True})
    printed = opening.plan(config)
    assert printed.startswith("self-check, all passed\n")
    assert "one example moves the clipped sum by at most its bound" in printed
    assert "noises are as accounted" in printed
    assert "whole and in chunks: auto, bookkeeping, ghost, vmap" in printed


RECIPES = (
    "digits_mlp_adaptive",
    "digits_mlp_bandmf",
    "digits_mlp_dicesgd",
    "digits_mlp_dicesgd:two_channels",
    "digits_mlp_diff2",
    "digits_mlp_diff2:spiderboost",
    "digits_mlp_diff2:bvr_l_sgd",
    "digits_mlp_dpzero",
)


def mechanism_of(name):
    file, *variant = name.split(":")
    recipe = importlib.import_module(f"configs.{file}").get_config(*variant)
    mechanism = recipe.mechanism.to_dict() | {"steps": 12}
    if "epsilon" in mechanism:
        mechanism |= {"epsilon": None, "noise_multiplier": 4.0}
    return mechanism


@pytest.fixture
def one_fast_engine(monkeypatch):
    """All of them under all mechanisms are the contract's part: compiling takes long."""
    few = {name: checks.ENGINES[name] for name in ("bookkeeping", "vmap")}
    monkeypatch.setattr(checks, "ENGINES", few)


@pytest.fixture
def vmap_alone(monkeypatch):
    """Beside the engine of the config, which is what is broken if any is."""
    monkeypatch.setattr(checks, "ENGINES", {"vmap": checks.ENGINES["vmap"]})


@pytest.mark.usefixtures("one_fast_engine")
@pytest.mark.parametrize("name", thinned([(name,) for name in RECIPES], 4))
def test_every_mechanism_passes(name):
    passed = self_check(build_experiment(tiny(mechanism=mechanism_of(name))))
    assert "noises are as accounted" in passed


@pytest.mark.usefixtures("one_fast_engine")
def test_differences_of_a_part_pass():
    mechanism = mechanism_of("digits_mlp_diff2")
    config = tiny(mechanism=mechanism, **{"parameters.train": ("head/.*",)})
    assert "all passed" in self_check(build_experiment(config))


@pytest.mark.usefixtures("one_fast_engine")
def test_a_parameter_that_is_one_number_passes():
    assert "all passed" in self_check(with_a_number(dpjax.DpSgd))


def test_without_privacy_there_is_no_noise_to_check():
    assert "noise" not in self_check(experiment("nonprivate"))


def clip_times_ten(loss, query, batch, key):
    wide = dataclasses.replace(query, clip_norm=1e-3 * query.clip_norm)
    clipped, statistics = vmap(loss, wide, batch, key)
    total = jax.tree.map(lambda x: 1e4 * x, clipped.total)
    return dataclasses.replace(
        clipped, total=total, l2_bound=query.l2_bound
    ), statistics


def forgets_an_example(loss, query, batch, key):
    mask = jnp.asarray(batch.mask).at[0].set(False)
    return vmap(loss, query, batch._replace(mask=mask), key)


@jax.custom_batching.custom_vmap
def centred(x):
    return x


@centred.def_vmap
def _(axis_size, in_batched, x):
    """What batch normalisation does, smuggled past the missing batch axis."""
    del axis_size
    return (x - x.mean(axis=0) if in_batched[0] else x), in_batched[0]


def leaking_loss(params, example, key):
    honest = experiment().loss(params, example, key)
    return honest + centred(example["image"].astype(jnp.float32).sum())


class NoNoise(dpjax.DpSgd):
    def release(self, clipped, state, params, *, key, step):
        silent = dpjax.DpSgd(**vars(self) | {"noise_multiplier": 0.0})
        return silent.release(clipped, state, params, key=key, step=step)


class LessNoise(dpjax.DpSgd):
    def release(self, clipped, state, params, *, key, step):
        less = dpjax.DpSgd(
            **vars(self) | {"noise_multiplier": 0.9 * self.noise_multiplier}
        )
        return less.release(clipped, state, params, key=key, step=step)


class OneKey(dpjax.DpSgd):
    def release(self, clipped, state, params, *, key, step):
        return super().release(clipped, state, params, key=key, step=0 * step)


class FirstLeafOnly(dpjax.DpSgd):
    def release(self, clipped, state, params, *, key, step):
        mean, state = super().release(clipped, state, params, key=key, step=step)
        leaves, treedef = jax.tree.flatten(mean)
        if len(leaves) > 1:
            leaves[-1] = leaves[-1] / 10
        return treedef.unflatten(leaves), state


class EverySecondKey(dpjax.DpSgd):
    def release(self, clipped, state, params, *, key, step):
        late = (step + 1) // 2
        return super().release(clipped, state, params, key=key, step=late)


class NoNoiseOnNumbers(dpjax.DpSgd):
    def release(self, clipped, state, params, *, key, step):
        mean, state = super().release(clipped, state, params, key=key, step=step)
        return jax.tree.map(lambda x: x if x.ndim else 0 * x, mean), state


def with_a_number(mutant):
    """A model with a parameter of shape []."""
    honest = experiment()

    def init(key, example):
        return honest.model.init(key, example) | {"scale": jnp.ones(())}

    def loss(params, example, key):
        params = dict(params)
        return params.pop("scale") * honest.loss(params, example, key)

    mechanism = mutant(**vars(honest.mechanism))
    return broken(
        mechanism=mechanism, model=honest.model._replace(init=init), loss=loss
    )


def resized(leaf, like):
    return jnp.resize(leaf, like.shape)


class OneNoise(dpjax.DpSgd):
    def release(self, clipped, state, params, *, key, step):
        mean, state = super().release(clipped, state, params, key=key, step=step)
        longest = max(jax.tree.leaves(mean), key=jnp.size)
        return jax.tree.map(lambda x: resized(longest, x), mean), state


class OppositeNoise(dpjax.DpSgd):
    def release(self, clipped, state, params, *, key, step):
        mean, state = super().release(clipped, state, params, key=key, step=step)
        leaves, treedef = jax.tree.flatten(mean)
        leaves[2] = -resized(leaves[1], leaves[2])
        return treedef.unflatten(leaves), state


class ThreePercentLess(dpjax.DpSgd):
    def release(self, clipped, state, params, *, key, step):
        less = dpjax.DpSgd(
            **vars(self) | {"noise_multiplier": 0.97 * self.noise_multiplier}
        )
        return less.release(clipped, state, params, key=key, step=step)


class SmallerStddev(dpjax.DpSgd):
    @property
    def noise_stddev(self):
        return 0.97 * super().noise_stddev


class OneStep(dpjax.DpSgd):
    def event(self, steps=None):
        return super().event(min(steps or 1, 1))


class TwoPercentMore(Poisson):
    def draw(self, step, *, num_examples, seed):
        more = Poisson(rate=1.02 * self.rate)
        return more.draw(step, num_examples=num_examples, seed=seed)


class AccountedLess(Poisson):
    def compose(self, noise_multiplier, *, steps, num_examples):
        less = Poisson(rate=0.98 * self.rate)
        return less.compose(noise_multiplier, steps=steps, num_examples=num_examples)


class OneSize(Poisson):
    def draw(self, step, *, num_examples, seed):
        size = round(self.expected_batch_size(num_examples))
        rng = np.random.default_rng([seed, step])
        return rng.choice(num_examples, size=size, replace=False)


class Epochs(Poisson):
    """Of batches that are as large as with coins."""

    def draw(self, step, *, num_examples, seed):
        per_epoch = round(1 / self.rate)
        epoch, place = divmod(step, per_epoch)
        rng = np.random.default_rng([seed, epoch])
        return np.flatnonzero(rng.integers(per_epoch, size=num_examples) == place)


class OneBatch(Poisson):
    def draw(self, step, *, num_examples, seed):
        return super().draw(0 * step, num_examples=num_examples, seed=seed)


class PublicBatches(Poisson):
    def draw(self, step, *, num_examples, seed):
        return super().draw(step, num_examples=num_examples, seed=0 * seed)


class Favourites(Poisson):
    def draw(self, step, *, num_examples, seed):
        rates = np.where(np.arange(num_examples) % 2, 4 / 3, 2 / 3) * self.rate
        rng = np.random.default_rng([seed, step])
        return np.flatnonzero(rng.random(num_examples) < rates)


class SecretFavourites(Poisson):
    """On average over seeds, all are drawn alike."""

    def draw(self, step, *, num_examples, seed):
        half = np.random.default_rng(seed).permutation(num_examples) % 2
        rates = np.where(half, 4 / 3, 2 / 3) * self.rate
        rng = np.random.default_rng([seed, step])
        return np.flatnonzero(rng.random(num_examples) < rates)


class RarerEvent(dpjax.DpSgd):
    def event(self, steps=None):
        rarer = dataclasses.replace(self.sampling, rate=self.sampling.rate / 2)
        honest = dpjax.DpSgd(**vars(self) | {"sampling": rarer})
        return honest.event(steps)


@dataclasses.dataclass(frozen=True)
class Own:
    """Half of the examples, always the same: no relative of what ships."""

    share: int = 2
    adjacency = "add_or_remove_one"
    amplified = False
    compose = FullBatch.compose

    def expected_batch_size(self, num_examples):
        return num_examples / 2

    def max_participations(self, *, steps, num_examples):
        del num_examples
        return steps

    def draw(self, step, *, num_examples, seed):
        del step, seed
        return np.arange(num_examples // self.share)


def counts_twice(loss, query, batch, key):
    clipped, statistics = vmap(loss, query, batch, key)
    return dataclasses.replace(clipped, count=2 * clipped.count), statistics


def adaptive(engine):
    config = tiny(mechanism=mechanism_of("digits_mlp_adaptive"))
    return dataclasses.replace(build_experiment(config), engine=engine)


class TwiceTheRate(Poisson):
    def draw(self, step, *, num_examples, seed):
        twice = Poisson(rate=2 * self.rate)
        return twice.draw(step, num_examples=num_examples, seed=seed)


class CyclicAndMore(CyclicPoisson):
    def draw(self, step, *, num_examples, seed):
        more = CyclicPoisson(cycle=self.cycle, rate=1.5 * self.rate)
        return more.draw(step, num_examples=num_examples, seed=seed)


class TruncatedAndMore(TruncatedPoisson):
    def draw(self, step, *, num_examples, seed):
        more = TruncatedPoisson(rate=1.5 * self.rate, capacity=self.capacity)
        return more.draw(step, num_examples=num_examples, seed=seed)


class TruncatedTooLate(TruncatedPoisson):
    def draw(self, step, *, num_examples, seed):
        late = TruncatedPoisson(rate=self.rate, capacity=self.capacity + 5)
        return late.draw(step, num_examples=num_examples, seed=seed)


def sampling_as(sampling):
    return broken(
        mechanism=dataclasses.replace(experiment().mechanism, sampling=sampling)
    )


@pytest.mark.parametrize(
    "sampling",
    [
        CyclicPoisson(cycle=5, rate=0.3),
        CyclicPoisson(cycle=16, rate=1.0),
        TruncatedPoisson(rate=0.1, capacity=146),
    ],
)
def test_samplings_that_ship_pass(sampling):
    plan = sampling_as(sampling).mechanism
    assert "as the sampling is accounted, each example" in check_draws(plan)


BROKEN = {
    "clip x10": (lambda: broken(engine=clip_times_ten), "moves the total"),
    "an example dropped": (
        lambda: broken(engine=forgets_an_example),
        "not that of per-example gradients",
    ),
    "batch statistics": (lambda: broken(loss=leaking_loss), "depend on the other"),
    "not a number": (
        lambda: broken(loss=lambda p, e, k: jnp.log(0.0 * experiment().loss(p, e, k))),
        "is NaN or infinite",
    ),
    "no noise": (lambda: mechanism_as(NoNoise), "not alike on all"),
    "less noise": (lambda: mechanism_as(LessNoise), "not what is accounted"),
    "one key": (lambda: mechanism_as(OneKey), "the same noise"),
    "every second key": (lambda: mechanism_as(EverySecondKey), "the same noise"),
    "the noise of one leaf in all": (
        lambda: mechanism_as(OneNoise),
        "two parameters have the same noise",
    ),
    "leaf 2 = -leaf 1": (
        lambda: mechanism_as(OppositeNoise),
        "two parameters have the same noise",
    ),
    "noise x0.97": (lambda: mechanism_as(ThreePercentLess), "not what is accounted"),
    "stddev x0.97": (lambda: mechanism_as(SmallerStddev), "and the event says"),
    "epsilon of one step": (
        lambda: mechanism_as(OneStep),
        "accounts 1 releases of an example in 12 steps",
    ),
    "rate x1.02": (
        lambda: sampling_as(TwoPercentMore(rate=0.1)),
        "of other sizes than are accounted",
    ),
    "rate x0.98 in the event": (
        lambda: sampling_as(AccountedLess(rate=0.1)),
        "of other sizes than are accounted",
    ),
    "batches of one size": (
        lambda: sampling_as(OneSize(rate=0.1)),
        "of other sizes than are accounted",
    ),
    "shuffled epochs": (
        lambda: sampling_as(Epochs(rate=0.1)),
        "does not draw each example by coins of its own",
    ),
    "one batch": (
        lambda: sampling_as(OneBatch(rate=0.1)),
        "of other sizes than|does not draw each example by coins of its own",
    ),
    "public batches": (
        lambda: sampling_as(PublicBatches(rate=0.1)),
        "of other sizes than|does not draw each example by coins of its own",
    ),
    "another half for each seed": (
        lambda: sampling_as(SecretFavourites(rate=0.1)),
        "does not draw each example by coins of its own",
    ),
    "rate of the event": (
        lambda: mechanism_as(RarerEvent),
        "accounts other rates than its sampling draws with",
    ),
    "half twice as often": (
        lambda: sampling_as(Favourites(rate=0.1)),
        "does not draw each example by coins of its own",
    ),
    "one number": (lambda: with_a_number(NoNoiseOnNumbers), "not alike on all param"),
    "count x2": (lambda: adaptive(counts_twice), "moves the count of the clipped sum"),
    "one leaf": (lambda: mechanism_as(FirstLeafOnly), "not alike on all parameters"),
    "rate x2": (
        lambda: sampling_as(TwiceTheRate(rate=0.1)),
        "of other sizes than are accounted",
    ),
    "cyclic rate x1.5": (
        lambda: sampling_as(CyclicAndMore(cycle=5, rate=0.3)),
        "of other sizes than are accounted",
    ),
    "truncated rate x1.5": (
        lambda: sampling_as(TruncatedAndMore(rate=0.1, capacity=200)),
        "of other sizes than are accounted",
    ),
    "truncated too late": (
        lambda: sampling_as(TruncatedTooLate(rate=0.1, capacity=144)),
        "of other sizes than are accounted",
    ),
}


def test_noise_that_repeats_every_8_steps_is_named():
    class Every8(dpjax.DpSgd):
        def release(self, clipped, state, params, *, key, step):
            return super().release(clipped, state, params, key=key, step=step % 8)

    plan = mechanism_as(Every8).mechanism
    plan = dataclasses.replace(plan, steps=20)
    start = {"a": jnp.zeros((8, 3)), "b": jnp.zeros(())}
    with pytest.raises(SelfCheckError, match="two steps have the same noise"):
        check_fresh(plan, start)
    with pytest.raises(SelfCheckError, match="not what is accounted"):
        check_moments(plan)


def same_in_all_leaves(tree, **how):
    longest = max(jax.tree.leaves(tree), key=jnp.size)
    noise = dpjax.privacy.noise.add_noise(longest, **how)
    return jax.tree.map(lambda x: jnp.resize(noise, x.shape), tree)


def second_is_minus_first(tree, **how):
    leaves, treedef = jax.tree.flatten(dpjax.privacy.noise.add_noise(tree, **how))
    leaves[1] = -jnp.resize(leaves[0], leaves[1].shape)
    return treedef.unflatten(leaves)


def every_8_steps(tree, *, step, **how):
    return dpjax.privacy.noise.add_noise(tree, step=step % 8, **how)


def wrapped(tree, *, step, **how):
    return dpjax.privacy.noise.add_noise(tree, step=step % 2**16, **how)


def one_stream(tree, *, stream, **how):
    return dpjax.privacy.noise.add_noise(tree, stream=0 * stream, **how)


def one_percent_less(tree, *, stddev, **how):
    return dpjax.privacy.noise.add_noise(tree, stddev=0.99 * stddev, **how)


LEAVES = {"a": jnp.zeros((8, 3)), "b": jnp.zeros(5), "c": jnp.zeros(())}


@pytest.mark.parametrize(
    "mutant",
    [
        same_in_all_leaves,
        second_is_minus_first,
        every_8_steps,
        wrapped,
        one_stream,
        one_percent_less,
    ],
)
def test_noise_that_is_not_of_its_key_is_named(mutant, monkeypatch):
    monkeypatch.setattr(noises, "add_noise", mutant)
    with pytest.raises(SelfCheckError, match="not what its key, step, stream and leaf"):
        check_keys(LEAVES)


def test_noise_of_its_key_passes():
    assert "noise of 4 leaves" in check_keys({**LEAVES, "none": jnp.zeros((3, 0))})
    assert "noise of 3 leaves" in check_keys(LEAVES)


def test_single_noises_may_meet_by_chance_but_not_at_every_step():
    """As they are rounded: of 64 noises of one parameter, two are alike now and then."""

    class Once(dpjax.DpSgd):
        def release(self, clipped, state, params, *, key, step):
            return super().release(clipped, state, params, key=key, step=step // 64)

    rows = np.round(np.random.default_rng(0).normal(size=(500, 64, 1)) * 1024)
    met = [len(np.unique(row)) < 64 for row in rows]
    assert any(met)
    assert not any(_related(row, at_least=0.9999) for row in rows)
    plan = dataclasses.replace(mechanism_as(Once).mechanism, steps=64)
    with pytest.raises(SelfCheckError, match="two steps have the same noise"):
        check_fresh(plan, {"a": jnp.zeros(())})


def test_epsilon_of_one_step_on_the_card_is_named(monkeypatch):
    real = accounting.epsilon
    monkeypatch.setattr(report, "epsilon", lambda m, steps, **_: real(m, steps=1))
    with pytest.raises(SelfCheckError, match="is not that of 12 steps"):
        check_accounting(experiment().mechanism)


@pytest.mark.parametrize("name", thinned([(name,) for name in PRIVATE], 3))
def test_plans_that_ship_are_accounted_and_drawn_as_they_say(name):
    assert "epsilon" in check_accounting(PRIVATE[name])
    assert "as the sampling is accounted" in check_draws(PRIVATE[name])


def test_of_a_sampling_of_ones_own_the_output_says_what_is_not_checked():
    told = check_draws(sampling_as(Own()).mechanism)
    assert "how Own is accounted is not known, nor checked" in told
    with pytest.raises(SelfCheckError, match="draws batches of 0 examples"):
        check_draws(sampling_as(Own(share=5000)).mechanism)


@pytest.mark.usefixtures("vmap_alone")
@pytest.mark.parametrize("name", thinned([(name,) for name in BROKEN], 3))
def test_what_is_broken_is_named(name):
    make, message = BROKEN[name]
    with pytest.raises(SelfCheckError, match=message):
        self_check(make())


def forgets_what_was_cut_off(loss, query, batch, key):
    clipped, statistics = vmap(loss, query, batch, key)
    residual = jax.tree.map(lambda x: 0.9 * x, clipped.residual)
    return dataclasses.replace(clipped, residual=residual), statistics


def test_an_engine_whose_residual_is_wrong_is_named():
    plan = build_experiment(tiny(mechanism=mechanism_of("digits_mlp_dicesgd")))
    wrong = dataclasses.replace(plan, engine=forgets_what_was_cut_off)
    with pytest.raises(SelfCheckError, match="sum of its parts"):
        self_check(wrong)


@pytest.mark.parametrize(
    ("broken_engine", "message"),
    [(clip_times_ten, "moves the total"), (forgets_an_example, "sum of its parts")],
)
def test_an_engine_that_is_broken_is_named_also_where_another_runs(
    monkeypatch, broken_engine, message
):
    monkeypatch.setitem(checks.ENGINES, "ghost", broken_engine)
    with pytest.raises(SelfCheckError, match=f"^ghost: .*{message}"):
        self_check(experiment())


def test_an_update_that_is_not_of_the_release_is_named(monkeypatch):
    def leaky(mechanism, optimizer, *, noise_key):
        honest = dpjax.private(mechanism, optimizer, noise_key=noise_key)

        def update(clipped, state, params=None, **extra):
            out, state = honest.update(clipped, state, params, **extra)
            return jax.tree.map(jnp.add, out, clipped.total), state

        return optax.GradientTransformationExtraArgs(honest.init, update)

    monkeypatch.setattr(checks, "private", leaky)
    with pytest.raises(SelfCheckError, match="not the optimizer's answer"):
        self_check(experiment())


def test_a_run_that_fails_its_check_releases_nothing(monkeypatch, tmp_path):
    def refuse(experiment):
        raise SelfCheckError("no")

    monkeypatch.setattr(opening, "self_check", refuse)
    with pytest.raises(SelfCheckError):
        train.train(tiny(**{"run.self_check": True}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class HalfOfABillion(Poisson):
    """Draws from the first half of the data only, where there are very many."""

    def draw(self, step, *, num_examples, seed):
        size = num_examples // 2 if num_examples > 10**8 else num_examples
        return super().draw(step, num_examples=size, seed=seed)


@pytest.mark.parametrize("sampling", [Poisson, TruncatedPoisson])
def test_draws_of_a_billion_examples_are_checked_in_little_memory(sampling):
    more = {"capacity": 10_200} if sampling is TruncatedPoisson else {}
    plan = dpjax.DpSgd(
        sampling=sampling(rate=1e-5, **more), steps=100, num_examples=10**9,
        delta=1e-10, clip_norm=1.0, clip_style="flat", noise_multiplier=1.0,
    )  # fmt: skip
    tracemalloc.start()
    told = check_draws(plan)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "4 of all 1000000000" in told
    assert peak < 200e6
    if sampling is Poisson:
        wrong = dataclasses.replace(plan, sampling=HalfOfABillion(rate=1e-5))
        with pytest.raises(SelfCheckError, match="of other sizes than are accounted"):
            check_draws(wrong)
