import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.clipping import Query, bookkeeping, plain
from dpjax.models import peft
from dpjax.models.gpt2 import gpt2
from dpjax.models.losses import causal_lm
from dpjax.models.partition import flatten, merge, partition, unflatten, with_frozen
from dpjax.training.config import ConfigError
from dpjax.training.experiment import build_experiment
from dpjax.training.opening import plan
from dpjax.training.startup import check_parts
from dpjax.training.train import train
from dpjax.typing import Batch
from tests.checks import thinned
from tests.runs import assert_same_export, card, crash_after, exported, tiny

pytestmark = pytest.mark.usefixtures("shared_steps")

PARAMS = unflatten(
    {
        name: np.full(2, i)
        for i, name in enumerate(
            ["layers_0/mlp/bias", "layers_0/mlp/kernel", "head/bias", "head/kernel"]
        )
    }
)


@pytest.mark.parametrize(
    ("train", "names"),
    [
        (["head/.*"], {"head/bias", "head/kernel"}),
        ([".*bias"], {"head/bias", "layers_0/mlp/bias"}),
        (["head/kernel", ".*mlp/kernel"], {"head/kernel", "layers_0/mlp/kernel"}),
    ],
)
def test_a_partition_takes_whole_names_and_merges_back(train, names):
    trained, frozen = partition(PARAMS, train)
    assert flatten(trained).keys() == names
    assert flatten(frozen).keys() == flatten(PARAMS).keys() - names
    jax.tree.map(np.testing.assert_array_equal, merge(trained, frozen), PARAMS)


def test_any_pytree_can_be_trained_as_a_whole():
    params = [np.zeros(2), (np.ones(1),)]
    trained, frozen = partition(params, [".*"])
    assert trained is params
    assert merge(trained, frozen) is params


ONE = jnp.zeros(3)
WRONG = {
    "nothing matches": (PARAMS, ["head"], "'head' matches none of head/bias"),
    "one matches nothing": (PARAMS, [".*bias", "norm/.*"], "'norm/.*' matches none"),
    "no pattern": (
        PARAMS,
        [],
        r"train=\(\) leaves everything frozen; '.\*' trains all",
    ),
    "no expression": (PARAMS, ["*"], r"'\*' is no regular expression: nothing to rep"),
    "a tie is cut": (
        {"head": {"kernel": ONE}, "token": {"table": ONE}},
        ["head/.*"],
        "'head/kernel' is trained and 'token/table' is frozen, and both are one array",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_partitions_raise(case):
    params, train, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        partition(params, train)


# --- In a run -----------------------------------------------------------------------------

HEAD = {"parameters.train": ("head/.*",)}


def pretrained(path):
    model = tiny()["model"]
    return {
        "name": "dpjax.models.weights:exported",
        "model": model,
        "path": str(path / "export"),
        "fresh": ("head/.*",),
    }


def test_frozen_parameters_stay_and_a_resumed_run_is_the_undisturbed_one(
    tmp_path, monkeypatch, capsys
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    config = tiny(**HEAD)
    state = train(config, whole)
    assert "610, of which 90 are trained" in capsys.readouterr().out
    assert [*flatten(state.params)] == ["head/bias", "head/kernel"]
    with monkeypatch.context() as patch:
        crash_after(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            train(config, broken)
    train(config, broken)
    assert_same_export(broken, whole)
    experiment = build_experiment(config)
    example = jax.tree.map(lambda x: x[0], experiment.source[[0]])
    start = jax.jit(experiment.model.init)(state.init_key, example)
    after = exported(whole)
    np.testing.assert_array_equal(
        after["dense_0"]["kernel"], start["dense_0"]["kernel"]
    )
    assert np.all(after["head"]["kernel"] != start["head"]["kernel"])
    names = json.loads((whole / "export" / "parameters.json").read_text())
    assert names == {
        "trained": ["head/bias", "head/kernel"],
        "frozen": ["dense_0/bias", "dense_0/kernel"],
    }


def test_a_run_starts_from_an_export_and_goes_on_with_the_same_weights_only(
    tmp_path, monkeypatch
):
    first, second = tmp_path / "first", tmp_path / "second"
    train(tiny("nonprivate"), first)
    config = tiny(
        model=pretrained(first), **HEAD, **{"parameters.provenance": "public"}
    )
    with monkeypatch.context() as patch:
        crash_after(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            train(config, second)
    weights = first / "export" / "params.npz"
    arrays = dict(np.load(weights))
    np.savez(weights, **arrays | {"dense_0/bias": arrays["dense_0/bias"] + 1})
    with pytest.raises(ConfigError, match="holds a run on other frozen parameters"):
        train(config, second)
    np.savez(weights, **arrays)
    train(config, second)
    np.testing.assert_array_equal(
        exported(second)["dense_0"]["kernel"], arrays["dense_0/kernel"]
    )
    assert "trained on public data" in card(second)["assumptions"][-1]


def test_an_export_of_private_data_is_not_called_public(tmp_path):
    first, second, head = tmp_path / "first", tmp_path / "second", tmp_path / "head"
    public, private = ({"parameters.provenance": p} for p in ("public", "private"))
    refused = pytest.raises(ConfigError, match="whose privacy card tells of private")
    train(tiny(), first)
    with refused:
        plan(tiny(model=pretrained(first), **public))
    plan(tiny(model=pretrained(first), **private))
    # Too little noise for any epsilon protects nothing, and the data are private still.
    written = first / "export" / "privacy_card.json"
    told = json.loads(written.read_text())
    written.write_text(json.dumps(told | {"epsilon": "inf"}))
    with refused:
        plan(tiny(model=pretrained(first), **public))
    # What is public by its own data is private by what it started from.
    train(tiny("nonprivate", model=pretrained(first), **HEAD, **private), second)
    with refused:
        plan(tiny(model=pretrained(second), **public))
    # All that was trained starts anew.
    train(tiny(**HEAD), head)
    plan(tiny(model=pretrained(head), **public))


def test_an_export_with_more_than_the_model_is_refused(tmp_path):
    (tmp_path / "export").mkdir()
    config = tiny(model=pretrained(tmp_path), **{"parameters.provenance": "public"})
    known = {"dense_0/kernel": np.zeros((64, 8)), "dense_0/bias": np.zeros(8)}

    def start_from(**more):
        np.savez(tmp_path / "export" / "params.npz", **known, **more)
        return check_parts(build_experiment(config))

    start_from(**{"head/kernel": np.zeros(3)})  # fresh: whatever it is
    with pytest.raises(
        ConfigError, match="has dense_0/lora_a, which the model has not"
    ):
        start_from(**{"dense_0/lora_a": np.zeros((64, 2))})


def test_starting_from_private_data_marks_the_card():
    config = tiny(**{"parameters.provenance": "private"})
    assert "starts from parameters that were trained on private data" in plan(config)


def test_partitions_that_do_not_fit_the_model_are_config_errors():
    config = tiny(**{"parameters.train": ("hed/.*",)})
    message = r"config.parameters.train: 'hed/\.\*' matches none of dense_0/bias"
    with pytest.raises(ConfigError, match=message):
        check_parts(build_experiment(config))


# --- In the engines -----------------------------------------------------------------------


def gpt():
    return gpt2(
        vocab_size=64, length=16, layers=2, width=16, heads=2, dtype="float32",
        scan=False, remat=False,
    )  # fmt: skip


PARTS = {
    "lora": (
        lambda: peft.lora(gpt(), rank=2, scale=1.0, targets=(".*(query|value|up)",)),
        ".*lora_[ab]",
    ),
    "norms": (gpt, ".*norm.*"),
    "the last norm": (gpt, "norm/.*"),
}


@pytest.mark.parametrize("part", thinned([(part,) for part in PARTS], 3))
def test_engines_do_no_work_for_frozen_parameters(part):
    """FLOPs of the clipped step over those of one gradient of what is trained.

    With all parameters trained they are 1.5 (the last norm: 3.1) times as many.
    """
    model, pattern = PARTS[part]
    tokens = jnp.zeros((4, 16), jnp.int32)
    batch = Batch({"tokens": tokens}, jnp.ones(4, bool), jnp.arange(4))
    loss, key = causal_lm(model()), jax.random.key(0)
    shapes = jax.eval_shape(model().init, key, {"tokens": tokens[0]})
    trained, frozen = partition(shapes, [pattern])

    def flops(engine, clip_norm):
        def step(trained, frozen):
            query = Query((trained,), clip_norm=clip_norm)
            return engine(with_frozen(loss, frozen), query, batch, key)[0].total

        lowered = jax.jit(step).lower(trained, frozen)
        return lowered.compile().cost_analysis()["flops"]

    assert flops(bookkeeping, 1.0) < 1.03 * flops(plain, jnp.inf)
