"""private(): sums in, safe updates out, and nothing else."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

import dpjax
from dpjax.clipping import microbatched, vmap
from dpjax.privacy.sensitive import SEAL, ClippedSum

PARAMS = {"w": jnp.ones((5, 3)), "b": jnp.zeros(3)}
MECHANISM = dpjax.DpSgd(
    clip_norm=1.0,
    clip_style="flat",
    noise_multiplier=1.0,
    sampling=dpjax.Poisson(rate=0.1),
    steps=4,
    num_examples=100,
    delta=1e-5,
)
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(optax.cosine_decay_schedule(0.1, 10), momentum=0.9),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "lamb": optax.lamb(1e-2),
}
all_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


def empty_sum(bound=1.0):
    return ClippedSum.zeros(PARAMS, l2_bound=bound)


def private(optimizer=OPTIMIZERS["sgd"], seed=0):
    return dpjax.private(MECHANISM, optimizer, noise_key=dpjax.root_key(seed))


def is_nan(tree):
    return all(np.isnan(x).all() for x in jax.tree.leaves(tree))


def is_finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


@all_optimizers
def test_any_optax_optimizer_sees_the_released_mean(name):
    transform = private(OPTIMIZERS[name])
    updates, state = transform.update(empty_sum(), transform.init(PARAMS), PARAMS)
    mean, _ = MECHANISM.release(empty_sum(), (), PARAMS, key=dpjax.root_key(0), step=0)
    inner = OPTIMIZERS[name]
    expected, _ = inner.update(mean, inner.init(PARAMS), PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), updates, expected)
    assert int(state.step) == 1


@all_optimizers
def test_state_is_type_stable_and_compiles_once(name):
    transform = private(OPTIMIZERS[name])
    update = jax.jit(transform.update)
    state = transform.init(PARAMS)
    types = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for _ in range(3):
        _, state = update(empty_sum(), state, PARAMS)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == types
    assert update._cache_size() == 1


def test_unknown_extra_arguments_are_accepted():
    transform = private()
    updates, _ = transform.update(
        empty_sum(), transform.init(PARAMS), PARAMS, value=1.0, odd_one="x"
    )
    assert is_finite(updates)


def test_no_release_beyond_the_plan():
    transform = private()
    state = transform.init(PARAMS)
    for _ in range(MECHANISM.steps):
        updates, state = transform.update(empty_sum(), state, PARAMS)
        assert is_finite(updates)
    updates, _ = transform.update(empty_sum(), state, PARAMS)
    assert is_nan(updates)


def test_each_step_has_its_own_noise_and_fingerprint():
    transform = private()
    state, seen, marks = transform.init(PARAMS), [], []
    for _ in range(MECHANISM.steps):
        updates, state = transform.update(empty_sum(), state, PARAMS)
        seen.append(np.ravel(updates["w"]))
        marks.append(int(state.released))
    assert len(np.unique(np.concatenate(seen))) == 15 * MECHANISM.steps
    assert len(set(marks)) == MECHANISM.steps


@pytest.mark.parametrize(
    "before",
    [
        optax.scale(10.0),
        optax.scale(0.1),
        optax.scale_by_sign(),
        optax.stateless(lambda u, p: jax.tree.map(jnp.square, u)),
        optax.stateless(lambda u, p: jax.tree.map(lambda x: 1 / x, u)),
        optax.stateless(lambda u, p: jax.tree.map(jnp.round, u)),
        optax.clip(0.01),
        optax.clip_by_global_norm(0.01),
        optax.set_to_zero(),
        optax.add_noise(0.1, 0.0, jax.random.key(0)),
        optax.scale_by_adam(),
        optax.trace(0.9),
        optax.ema(0.9),
        optax.add_decayed_weights(0.1),
        optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    ],
    ids=[
        "scale up",
        "scale down",
        "sign",
        "square",
        "reciprocal",
        "round",
        "clip",
        "clip_by_global_norm",
        "set_to_zero",
        "add_noise",
        "adam",
        "trace",
        "ema",
        "weight decay",
        "MultiSteps",
    ],
)
def test_a_transform_before_release_fails_or_poisons(before):
    chain = optax.chain(before, private())
    clipped = dataclasses.replace(
        empty_sum(), total=jax.tree.map(jnp.ones_like, PARAMS)
    )
    try:
        updates, _ = chain.update(clipped, chain.init(PARAMS), PARAMS)
    except (TypeError, ValueError, AttributeError):
        return
    assert is_nan(updates)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (jax.random.key(0), "key<fry>[]"),
        (jax.random.PRNGKey(0), "uint32[2]"),
        (jax.random.split(jax.random.PRNGKey(0)), "uint32[2, 2]"),
        (jax.random.split(jax.random.key(0), 3), "key<fry>[3]"),
        (jax.random.split(jax.random.key(0, impl="rbg")), "key<rbg>[2]"),
        (0, "int"),
        (None, "NoneType"),
        (dpjax.root_key, "function"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_noise_key_that_is_no_root_key_is_refused_at_once(key, kind):
    line = f"key={kind} must be dpjax.root_key(), two threefry2x32 keys of secret bits"
    with pytest.raises(ValueError, match="noise_" + re.escape(line)):
        dpjax.private(MECHANISM, OPTIMIZERS["sgd"], noise_key=key)
    with pytest.raises(ValueError, match=re.escape(line)):
        MECHANISM.release(empty_sum(), (), PARAMS, key=key, step=0)


def test_an_optimizer_that_is_none_is_refused_at_once():
    with pytest.raises(ValueError, match=r"optimizer=0\.1 must be an optax transform"):
        private(0.1)


def test_flax_train_states_take_clipped_sums():
    """They ask whether a name is in the gradients, and hand them to the transform."""
    create = train_state.TrainState.create
    state = create(apply_fn=None, params=PARAMS, tx=private(OPTIMIZERS["adam"]))
    after = jax.jit(lambda s, total: s.apply_gradients(grads=total))(state, empty_sum())
    transform = private(OPTIMIZERS["adam"])
    updates, expected = transform.update(empty_sum(), transform.init(PARAMS), PARAMS)
    assert int(after.step) == int(after.opt_state.step) == 1
    assert int(after.opt_state.released) == int(expected.released)
    jax.tree.map(
        lambda p, u, q: np.testing.assert_allclose(p + u, q, 1e-6),
        PARAMS,
        updates,
        after.params,
    )


def test_a_plain_gradient_is_refused():
    transform = private()
    with pytest.raises(TypeError, match="releases a ClippedSum, not dict"):
        transform.update(PARAMS, transform.init(PARAMS), PARAMS)


def test_a_sum_clipped_further_out_is_not_released():
    transform = private()
    state = transform.init(PARAMS)
    assert is_nan(transform.update(empty_sum(bound=1.5), state, PARAMS)[0])
    assert is_finite(transform.update(empty_sum(bound=0.5), state, PARAMS)[0])


def test_merging_sums_of_different_bounds_breaks_the_seal():
    assert np.isnan(empty_sum(1.0).merge(empty_sum(2.0)).seal)
    assert empty_sum(1.0).merge(empty_sum(1.0)).seal == np.float32(SEAL)


def test_merging_cannot_mend_a_broken_seal():
    broken = jax.tree.map(lambda x: x * 2, empty_sum())
    whole = dataclasses.replace(broken, l2_bound=jnp.float32(1.0))
    assert np.isnan(empty_sum().merge(whole).seal)


def test_the_noise_key_is_an_argument_and_no_constant_of_the_program():
    transform = private(seed=5)
    text = (
        jax.jit(transform.update)
        .lower(empty_sum(), transform.init(PARAMS), PARAMS)
        .as_text()
    )
    for word in np.ravel(jax.random.key_data(dpjax.root_key(5))):
        assert str(word) not in text
        assert f"{word:08x}" not in text.lower()


def test_init_under_jit_is_refused_for_it_would_write_the_key_into_the_program():
    with pytest.raises(TypeError, match="must not be traced"):
        jax.jit(private().init)(PARAMS)


def test_sums_of_different_phases_do_not_merge():
    other = ClippedSum.zeros(PARAMS, l2_bound=1.0, phase="difference")
    with pytest.raises(ValueError, match="different queries"):
        empty_sum().merge(other)


def test_secrets_and_sums_do_not_print():
    state = private(seed=5).init(PARAMS)
    assert str(np.ravel(jax.random.key_data(state.noise_key))[0]) not in repr(state)
    assert "Array" not in repr(empty_sum())


def test_per_example_values_do_not_print():
    def loss(params, example, key):
        return jnp.sum(params["w"]) * example["x"]

    examples = {"x": jnp.full(4, 12345.0)}
    for engine in (vmap, microbatched(vmap, size=2)):
        grad = dpjax.clipped_grad(loss, clip_norm=1.0, engine=engine)
        _, statistics = grad(PARAMS, examples, jax.random.key(0))
        assert "12345" not in f"{statistics} {statistics!r}"
        losses = dpjax.reveal(statistics)["losses"]
        np.testing.assert_allclose(losses, 15 * 12345.0)
