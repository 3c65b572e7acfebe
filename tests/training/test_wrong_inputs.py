"""Wrong arguments of public functions -> one line with the value and the fix, at once."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpjax
from dpjax import optimizers
from dpjax.audit import estimators, verdict
from dpjax.data import arrays, augment, images, text, tokenizers
from dpjax.models import bert, generate, gpt2, inputs, llama, losses, mlp, peft, weights
from dpjax.models.partition import partition
from dpjax.privacy import accounting, noise
from dpjax.training import evaluate
from experiments import audit, compose, gather, plots
from experiments.audits.settings import SETTINGS
from experiments.sweeps import sweep
from launch.__main__ import main as launch

SGD = SETTINGS["DpSgd, Poisson"]
BYTES = tokenizers.byte_level(specials=("<eos>",))
SMALL = gpt2.gpt2(
    vocab_size=9,
    length=4,
    layers=1,
    width=4,
    heads=1,
    dtype="float32",
    scan=False,
    remat=False,
)
MLP = mlp.mlp(features=(), num_classes=3, activation="tanh")
KEY = dpjax.root_key(0)


def numeric_fields():
    for plan in {type(plan): plan for plan in SETTINGS.values()}.values():
        for field in dataclasses.fields(plan):
            kinds = (field.type, *get_args(field.type))
            if float in kinds or int in kinds:
                yield pytest.param(
                    plan, field, id=f"{type(plan).__name__}-{field.name}"
                )


@pytest.mark.parametrize(("plan", "field"), [*numeric_fields()])
def test_numbers_of_a_plan_are_numbers(plan, field):
    """A function of the step says where such are taken, whatever the field."""

    def schedule(step):
        return 1.0

    wanted = f"^{field.name}=.*: a number is wanted; public schedules: ScheduledDpSgd$"
    with pytest.raises(ValueError, match=wanted):
        dataclasses.replace(plan, **{field.name: schedule})
    for wrong in ("0.5", True, None):
        if wrong is None and type(None) in get_args(field.type):
            continue
        wanted = f"^{field.name}={wrong!r}(: a number is wanted| must be an integer)"
        with pytest.raises(ValueError, match=wanted):
            dataclasses.replace(plan, **{field.name: wrong})


@pytest.mark.parametrize("name", SETTINGS)
def test_a_sampling_is_a_sampling(name):
    for wrong in (0.1, "Poisson", None, dpjax.Poisson):
        with pytest.raises(ValueError, match=r"^sampling=.* must be "):
            dataclasses.replace(SETTINGS[name], sampling=wrong)


@pytest.mark.parametrize(
    "sampling",
    {type(plan.sampling): plan.sampling for plan in SETTINGS.values()}.values(),
)
def test_sizes_of_a_sampling_are_numbers(sampling):
    with pytest.raises(ValueError, match=r"^num_examples='10' must be an integer"):
        sampling.expected_batch_size("10")


def loss(params, example, key):
    return jnp.sum(params * example["x"])


def called(**changes):
    given = {
        "params": jnp.ones(3),
        "batch": {"x": jnp.ones((4, 3))},
        "key": jax.random.key(0),
    }
    return dpjax.clipped_grad(loss, clip_norm=1.0, engine="vmap")(**given | changes)


def drawn(**changes):
    source = arrays.ArraySource({"x": np.ones((16, 3))})
    given = {"source": source, "mechanism": SGD, "seed": 1, "physical_batch_size": 4}
    given |= changes
    return dpjax.batches(given.pop("source"), given.pop("mechanism"), **given)


def sampled(prompts, lengths, key):
    generator = generate.generator(
        SMALL,
        max_new_tokens=1,
        stop_token=0,
        temperature=1.0,
        top_k=None,
        top_p=1.0,
    )
    return generator({}, prompts, lengths, key)


def table(folder, rows, **changes):
    path = folder / "table.csv"
    path.write_text(rows)
    given = {
        "path": str(path),
        "delimiter": ",",
        "columns": (),
        "template": ("{s}", "<eos>"),
        "label": "y",
        "length": 8,
        "tokenizer": BYTES,
    }
    return text.labelled_texts(**given | changes)


def damaged(folder, read, name="params.npz"):
    (folder / name).write_bytes(b"PK\x03\x04 and no more")
    return read(folder)


def of_exported(folder):
    return weights.exported(MLP, path=str(folder), fresh=()).init(
        jax.random.key(0), {"image": np.zeros((2, 2, 1), np.float32)}
    )


def cached(folder):
    """Read a cache of images that was cut short."""
    from PIL import Image

    (folder / "train/a").mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "train/a/0.png")
    given = {"path": str(folder), "split": "train", "cache": str(folder / "cache")}
    images.image_folder(**given)
    (file,) = (folder / "cache").glob("*.npy")
    file.write_bytes(file.read_bytes()[:50])
    return images.image_folder(**given)


WRONG = {
    "a loss that is none": (
        lambda: dpjax.clipped_grad(3.0, clip_norm=1.0),
        "loss=3.0 must be a function",
    ),
    "a clip norm in letters": (
        lambda: dpjax.clipped_grad(loss, clip_norm="1"),
        "clip_norm='1': a number is wanted",
    ),
    "a clip norm beyond float32": (
        lambda: dpjax.clipped_grad(loss, clip_norm=1e39),
        "clip_norm=1e+39 is above 1e+36",
    ),
    "a scheduled outer norm": (
        lambda: dpjax.clipped_grad(loss, clip_norm=1.0, outer_norm=lambda step: 2.0),
        ": a number is wanted; public schedules: ScheduledDpSgd",
    ),
    "no engine": (
        lambda: dpjax.clipped_grad(loss, clip_norm=1.0, engine=None),
        "engine=None must be an engine, or the name of one",
    ),
    "verify in words": (
        lambda: dpjax.clipped_grad(loss, clip_norm=1.0, verify="no"),
        "verify='no' must be True or False",
    ),
    "a budget in words": (
        lambda: dpjax.clipped_grad(loss, clip_norm=1.0, memory_budget="2GB"),
        "memory_budget='2GB': a number is wanted",
    ),
    "a ragged batch": (
        lambda: called(batch={"x": jnp.ones((4, 3)), "y": jnp.ones(5)}),
        "must begin with the axis of the examples, of one size",
    ),
    "a batch of words": (
        lambda: called(batch={"x": np.array(["a", "b"])}),
        "the batch has an array of dtype <U1",
    ),
    "a short mask": (
        lambda: called(
            batch=dpjax.Batch({"x": jnp.ones((4, 3))}, jnp.ones(3, bool), jnp.arange(4))
        ),
        "batch.mask has shape (3,); it must be (4,)",
    ),
    "a short index": (
        lambda: called(
            batch=dpjax.Batch({"x": jnp.ones((4, 3))}, jnp.ones(4, bool), jnp.arange(3))
        ),
        "batch.index has shape (3,); it must be (4,)",
    ),
    "no params": (lambda: called(params={}), "params must be a tree of arrays"),
    "keys": (
        lambda: called(key=jax.random.split(jax.random.key(0), 4)),
        "key has shape (4,); one key is wanted",
    ),
    "a style of a query": (
        lambda: dpjax.Query((jnp.ones(3),), clip_norm=1.0, style="round"),
        "style='round' is unknown",
    ),
    "signs of a query": (
        lambda: dpjax.Query((jnp.ones(3),), clip_norm=1.0, signs=(1.0, -1.0)),
        "signs=(1.0, -1.0) must be one for each of 1 points",
    ),
    "a negative query": (
        lambda: dpjax.Query((jnp.ones(3),), clip_norm=-1.0),
        "clip_norm=-1.0 must be at least 0",
    ),
    "no mechanism": (
        lambda: dpjax.private(
            None, optimizers.tunable_sgd(learning_rate=1.0), noise_key=KEY
        ),
        "mechanism=None must be a mechanism",
    ),
    "a seed in letters": (lambda: dpjax.root_key("a"), "seed='a' must be an integer"),
    "a rate of restarts": (
        lambda: dpjax.diff2(restart_every=2.5),
        "restart_every=2.5 must be an integer",
    ),
    "a style of feedback": (
        lambda: dpjax.error_feedback(
            error_clip_norm=1.0, error_scale="sum", divisor=1.0, style="round"
        ),
        "style='round' is unknown",
    ),
    "a divisor in letters": (
        lambda: dpjax.error_feedback(
            error_clip_norm=1.0, error_scale="sum", divisor="8"
        ),
        "divisor='8': a number is wanted",
    ),
    "half a step": (
        lambda: dpjax.epsilon(SGD, steps=2.5),
        "steps=2.5 is outside the plan",
    ),
    "epsilon of a class": (
        lambda: dpjax.epsilon(dpjax.DpSgd),
        "must be a mechanism, such as dpjax.DpSgd(...)",
    ),
    "an epsilon in letters": (
        lambda: dpjax.calibrate(lambda z: SGD, epsilon="3"),
        "epsilon='3': a number is wanted",
    ),
    "nothing to calibrate": (
        lambda: dpjax.calibrate(SGD, epsilon=3.0),
        "must be a function from the noise multiplier to a mechanism",
    ),
    "steps of another search": (
        lambda: accounting.tuning_cost([SGD], steps=[1, 2]),
        "steps=[1, 2] must be one number for each of 1 mechanisms",
    ),
    "more steps than planned": (
        lambda: accounting.tuning_cost([SGD], steps=[SGD.steps + 1]),
        "is outside the plan",
    ),
    "a profile of more": (
        lambda: accounting.privacy_profile(SGD, [1.0], steps=SGD.steps + 1),
        "is outside the plan",
    ),
    "rows in halves": (
        lambda: drawn(physical_batch_size=2.5),
        "physical_batch_size=2.5 must be an integer of at least 1",
    ),
    "a start before the first": (
        lambda: drawn(start=-1),
        "start=-1 must be a step of the plan, 0 to mechanism.steps=6",
    ),
    "batches of nothing": (lambda: drawn(mechanism=None), "mechanism=None must be"),
    "a list for a source": (
        lambda: arrays.ArraySource(np.ones(3)),
        "arrays must be a dict of arrays",
    ),
    "a fraction in letters": (
        lambda: arrays.digits(split="train", test_fraction="0.2"),
        "test_fraction='0.2': a number is wanted",
    ),
    "no friends": (
        lambda: arrays.friedman(
            split="train", test_fraction=0.5, num_examples=0, noise=1.0, seed=0
        ),
        "num_examples=0 must be an integer",
    ),
    "none to train on": (
        lambda: arrays.friedman(
            split="train", test_fraction=0.9, num_examples=2, noise=1.0, seed=0
        ),
        "test_fraction=0.9 of 2 examples leaves none for training",
    ),
    "shots of no class": (
        lambda: arrays.few_shots(
            source=arrays.ArraySource({"x": np.ones(3)}), per_class=1
        ),
        "source has no 'label', only ['x']",
    ),
    "no tokenizer": (
        lambda: text.text_lines(path="x", length=4, tokenizer="byte"),
        "tokenizer='byte' must be a tokenizer",
    ),
    "length in letters": (
        lambda: text.text_lines(path="x", length="4", tokenizer=BYTES),
        "length='4' must be an integer of at least 1",
    ),
    "no path": (
        lambda: text.text_lines(path=None, length=4, tokenizer=BYTES),
        "path=None must be the name of a file or folder",
    ),
    "specials in one string": (
        lambda: tokenizers.byte_level(specials="<eos>"),
        "specials='<eos>' must be a tuple of different names",
    ),
    "a special twice": (
        lambda: tokenizers.byte_level(specials=("<a>", "<a>")),
        "must be a tuple of different names",
    ),
    "texts that are not there": (
        lambda: tokenizers.train_bpe(
            paths=("no.txt",), vocab_size=300, specials=(), out="x", provenance="public"
        ),
        "paths=('no.txt',) must be text files that are there",
    ),
    "widths in letters": (
        lambda: mlp.mlp(features="64", num_classes=3, activation="tanh"),
        "features='64' must be a tuple of widths",
    ),
    "no classes": (
        lambda: mlp.mlp(features=(), num_classes=0, activation="tanh"),
        "num_classes=0 must be an integer of at least 1",
    ),
    "channels of another number": (
        lambda: inputs.standardized(MLP, mean=(0.0, 1.0), std=(1.0,)),
        "must have one number for each channel",
    ),
    "a scale in letters": (
        lambda: peft.lora(MLP, rank=1, scale="2", targets=("head",)),
        "scale='2': a number is wanted",
    ),
    "adapters for nothing": (
        lambda: peft.lora(MLP, rank=1, scale=2.0, targets=()),
        "targets=() adapts nothing",
    ),
    "a prompt behind the text": (
        lambda: peft.prompt(SMALL, length=1, position=9).init(
            jax.random.key(0), {"tokens": np.zeros(3, np.int32)}
        ),
        "position=9 is behind the 3 tokens of an example",
    ),
    "a fraction of a token": (
        lambda: gpt2.gpt2_small(
            vocab_size=16.5, length=8, dtype="float32", scan=True, remat=False
        ),
        "vocab_size=16.5 must be an integer of at least 1",
    ),
    "no position": (
        lambda: bert.bert_base(
            vocab_size=16, length=0, dtype="float32", scan=True, remat=False
        ),
        "length=0 must be an integer of at least 1",
    ),
    "a llama of no position": (
        lambda: llama.llama(
            vocab_size=16,
            length=-1,
            layers=1,
            width=8,
            heads=2,
            kv_heads=1,
            hidden=8,
            rotary_base=1e4,
            epsilon=1e-5,
            tied=True,
            dtype="float32",
            scan=False,
            remat=False,
        ),
        "length=-1 must be an integer of at least 1",
    ),
    "one string for patterns": (
        lambda: partition({"a": jnp.ones(2)}, "a"),
        "patterns='a' must be a tuple of regular expressions",
    ),
    "no pattern": (
        lambda: weights.pretrained(
            SMALL, path="x", family="gpt2", fresh=("(",), skip=()
        ),
        "fresh=('(',) must be a tuple of regular expressions; '(' is no regular",
    ),
    "prompts of one axis": (
        lambda: sampled(jnp.zeros(4, int), jnp.ones(1, int), jax.random.key(0)),
        "must be [B, T] and [B]",
    ),
    "prompts that are no tokens": (
        lambda: sampled(jnp.zeros((1, 2)), jnp.ones(1, int), jax.random.key(0)),
        "prompts are float32; they must be integers",
    ),
    "an old key": (
        lambda: sampled(jnp.zeros((1, 2), int), jnp.ones(1, int), 0),
        "make it by jax.random.key(seed)",
    ),
    "smoothing in letters": (
        lambda: losses.classification(MLP, label_smoothing="0.1"),
        "label_smoothing='0.1': a number is wanted",
    ),
    "no model": (lambda: losses.accuracy(None), "model=None must be a dpjax.Model"),
    "half a view": (
        lambda: losses.augmented(loss, augment=augment.identity(), views=1.5),
        "views=1.5 must be an integer",
    ),
    "no batch": (
        lambda: evaluate.evaluator(losses.accuracy(MLP), batch_size=0, layout=None),
        "batch_size=0 must be an integer",
    ),
    "too much momentum": (
        lambda: optimizers.sgdw(learning_rate=0.1, momentum=1.5, weight_decay=0.0),
        "momentum=1.5 must be in [0, 1)",
    ),
    "negative noise": (
        lambda: noise.add_noise(jnp.ones(3), key=KEY, step=0, stddev=-1.0),
        "stddev=-1.0 must be at least 0",
    ),
    "no attacks": (
        lambda: verdict.audit_mechanism(
            SGD, trials=9, seed=0, confidence=0.9, attacks=()
        ),
        "attacks=() names none",
    ),
    "a loss of nothing": (
        lambda: dpjax.clipped_grad(lambda *_: None, clip_norm=1.0)(
            jnp.ones(3), {"x": jnp.ones((4, 3))}, jax.random.key(0)
        ),
        "loss returned None; it must return one floating-point scalar",
    ),
    "a query of no point": (
        lambda: dpjax.Query((), clip_norm=1.0, signs=()),
        "points=() asks for no gradient",
    ),
    "a draw before the first": (
        lambda: dpjax.Poisson(rate=0.5).draw(-1, num_examples=9, seed=1),
        "step=-1 must be an integer of at least 0",
    ),
    "a draw with a seed in letters": (
        lambda: dpjax.Poisson(rate=0.5).draw(0, num_examples=9, seed="a"),
        "seed of type str must be an integer",
    ),
    "a draw with a negative seed": (
        lambda: dpjax.ShuffledFixed(batch_size=3).draw(0, num_examples=9, seed=-1),
        "seed of type int must be an integer of 0 to 2**128 - 1",
    ),
    "a negative epsilon of a profile": (
        lambda: accounting.privacy_profile(SGD, [1.0, -1.0]),
        "epsilons=-1.0 must be at least 0",
    ),
    "shots of no source": (
        lambda: arrays.few_shots(source=None, per_class=1),
        "source=None must be a source of examples",
    ),
    "trials for a negative epsilon": (
        lambda: estimators.trials_needed(epsilon=-1.0, delta=1e-5, confidence=0.9),
        "epsilon=-1.0 must be at least 0",
    ),
    "scores in letters": (
        lambda: estimators.count(["a"], ["b"], threshold=0.5),
        "scores must be two arrays of numbers: could not convert",
    ),
    "a schedule of words": (
        lambda: dataclasses.replace(
            SETTINGS["ScheduledDpSgd"], noise_schedule=lambda step: "1"
        ),
        "schedule(0)='1': a number is wanted",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_one_line(name):
    run, message = WRONG[name]
    with pytest.raises((ValueError, TypeError)) as caught:
        run()
    assert message in str(caught.value).partition("\n-----")[0]
    assert type(caught.value).__module__ in ("builtins", "dpjax.training.config")


FILES = {
    "a damaged export": (
        lambda folder: damaged(folder, of_exported),
        "params.npz' is damaged",
    ),
    "a damaged archive": (
        lambda folder: damaged(
            folder, lambda f: arrays.npz(path=str(f / "params.npz"), split="train")
        ),
        "is no npz file of arrays",
    ),
    "a damaged cache": (cached, "is damaged (EOF"),
    "a damaged index": (
        lambda folder: damaged(
            folder,
            lambda f: weights.pretrained(
                SMALL, path=str(f), family="gpt2", fresh=(), skip=()
            ),
            name="model.safetensors.index.json",
        ),
        "does not name the parts of the weights",
    ),
    "scores in words": (
        lambda folder: damaged(folder, lambda f: audit._numbers(f / "params.npz")),
        "params.npz must have one number a line",
    ),
    "weights to a folder": (
        lambda folder: weights.write(str(folder), {}, family="gpt2"),
        "must be a file to write, such as model.safetensors",
    ),
    "weights to nowhere": (
        lambda folder: weights.write(str(folder / "a/b"), {}, family="gpt2"),
        "must be a file to write, such as model.safetensors",
    ),
    "two delimiters": (
        lambda folder: table(folder, "s,y\na,1\n", delimiter="||"),
        "delimiter='||' must be one character",
    ),
    "a template in one string": (
        lambda folder: table(folder, "s,y\na,1\n", template="{s}"),
        "template='{s}' must be a tuple of pieces",
    ),
    "a column twice": (
        lambda folder: table(folder, "s,s,y\na,b,1\n"),
        "its first line has a name twice",
    ),
    "a label that is too long": (
        lambda folder: table(folder, "s,y\na,99999999999\n"),
        "column y of row 1 is no integer of at most 9 digits",
    ),
    "a field that is too long": (
        lambda folder: table(folder, "s,y\n" + "a" * 200_000 + ",1\n"),
        "field larger than field limit (131072); check delimiter and quotes",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_used_are_one_line(name, tmp_path):
    run, message = FILES[name]
    with pytest.raises(ValueError, match=r".") as caught:
        run(tmp_path)
    assert message in str(caught.value).partition("\n-----")[0]


SWEEPS = {
    "no python": ("def (", "SyntaxError: invalid syntax"),
    "an error": ("1 / 0", "ZeroDivisionError: division by zero (sweep.py, line 1)"),
    "no config": (
        "BEST = 'lowest'\ndef config(): pass\ndef cells(): yield 1\n",
        "'NoneType' object has no attribute 'to_dict'",
    ),
    "no cells": (
        "from tests.tiny_config import get_config\nBEST = 'lowest'\n"
        "def config(): return get_config()\ndef cells(): yield {'a': 1}\n",
        "cells() yields {'a': 1}; it must yield Cells",
    ),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_wrong_sweep_files_are_one_line(name, tmp_path):
    code, message = SWEEPS[name]
    (tmp_path / "sweep.py").write_text(code)
    with pytest.raises(sweep.ConfigError) as caught:
        sweep.load(str(tmp_path / "sweep.py"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


RUN = ("--", "true")
JOBSET = ("jobset", "--name=a", "--dry_run", "--volume_claim=v", "--directory=/x")
COMMANDS = {
    "a manifest of nothing": (
        gather.main,
        ["{folder}"],
        {"sweep.json": "{}"},
        "it lists no sweep",
    ),
    "a damaged manifest": (
        gather.main,
        ["{folder}"],
        {"sweep.json": "broken"},
        "sweep.json is damaged",
    ),
    "a picture in place of a folder": (
        plots.main,
        ["{folder}/a", "--out={folder}/b.png"],
        {"a/metrics.jsonl": '{"step": 1, "test/accuracy": 1.0}\n', "b.png/c": ""},
        "b.png is a folder; name a file",
    ),
    "a damaged ledger": (
        compose.main,
        ["{folder}/a", "{folder}/b", "--out={folder}/c.md"],
        {
            f"{run}/{name}": content
            for run in "ab"
            for name, content in (
                ("config.json", "{}"),
                ("privacy_card.json", "{}"),
                ("ledger.txt", "garbage\n"),
            )
        },
        "line 1 of {folder}/a/ledger.txt is damaged",
    ),
    "a variable without a value": (
        launch,
        ["local", "--name=a", "--dry_run", "--env=A", *RUN],
        {},
        "--env=A has no value; use --env=NAME=VALUE",
    ),
    "an option of two lines": (
        launch,
        ["slurm", "--name=a", "--dry_run", "--directory=/x", "--partition=a\nb", *RUN],
        {},
        "must be one line",
    ),
    "an open quote": (
        launch,
        ["slurm", "--name=a", "--dry_run", "--directory=/x", '--sbatch="--mem', *RUN],
        {},
        "No closing quotation",
    ),
    "after no job": (
        launch,
        ["slurm", "--name=a", "--dry_run", "--directory=/x", "--after=soon", *RUN],
        {},
        "after='soon' must be the number of a job",
    ),
    "no image": (launch, [*JOBSET, "--image=", *RUN], {}, "image='' is empty"),
    "fewer restarts than none": (
        launch,
        [*JOBSET, "--image=i", "--max_restarts=-1", *RUN],
        {},
        "max_restarts=-1 must be at least 0",
    ),
    "less than idle": (
        launch,
        ["sky", "--name=a", "--dry_run", "--idle_minutes=-3", *RUN],
        {},
        "idle_minutes=-3 must be at least 0",
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_commands_are_one_line(name, capsys, tmp_path):
    main, argv, files, message = COMMANDS[name]
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
    assert main([a.replace("{folder}", str(tmp_path)) for a in argv]) == 2
    error = capsys.readouterr().err
    assert message.replace("{folder}", str(tmp_path)) in error
    assert error.splitlines()[-1].startswith("error: ")
