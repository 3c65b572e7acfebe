"""Wrong config or input -> one clear line and exit status 2, before any compute."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dpjax import Model
from dpjax.parallel.rules import TRANSFORMER
from dpjax.training import train as loop
from experiments.train import main
from tests.runs import ROOT, tiny

TINY = "--config=tests/tiny_config.py"


def convolutional():
    def init(key, example):
        return {"kernel": jnp.ones((3, 3, 1, 10))}

    def apply(params, example, key):
        image = example["image"].reshape(1, 8, 8, 1)
        how = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(
            image, params["kernel"], (1, 1), "SAME", dimension_numbers=how
        )
        return jnp.mean(out, axis=(0, 1, 2))

    return Model(init, apply)


WRONG_FLAGS = {
    "no config": ([], "--config=FILE is missing"),
    "no such config file": (
        ["--config=configs/nope.py"],
        "configs/nope.py is not a file",
    ),
    "unknown variant": (
        ["--config=configs/digits_mlp_dpsgd.py:fast"],
        "variant='fast' is unknown; use dpsgd or nonprivate",
    ),
    "no workdir": ([TINY], "--workdir=DIR is missing"),
    "empty workdir": ([TINY, "--workdir="], "--workdir=DIR is missing"),
    "no equals sign": (["--config", "a.py"], "--config FILE is written --config=FILE"),
    "unknown flag": ([TINY, "--workdri=x"], "Unknown command line flag 'workdri'"),
    "stray argument": ([TINY, "digits"], "unexpected argument 'digits'"),
    "unknown key": (
        [TINY, "--config.mechanism.clip_nrom=1"],
        "did you mean 'clip_norm'",
    ),
    "unknown group": (
        [TINY, "--config.mechanisms.steps=1"],
        "did you mean 'mechanism'",
    ),
    "key below a value": (
        [TINY, "--config.run.seed.x=1"],
        "config.run.seed.x is unknown",
    ),
    "not a number": (
        [TINY, "--config.mechanism.clip_norm=abc"],
        "could not convert string to float: 'abc'",
    ),
    "one process of unknown many": (
        [TINY, "--workdir=x", "--process_id=0"],
        "--coordinator_address is missing; coordinator_address, num_processes",
    ),
    "process beyond the last": (
        [
            *(TINY, "--workdir=x", "--coordinator_address=a:1"),
            *("--num_processes=2", "--process_id=2"),
        ],
        "--process_id=2 must be from 0 to below --num_processes=2",
    ),
    "coordinator without a port": (
        [
            *(TINY, "--workdir=x", "--coordinator_address=a"),
            *("--num_processes=2", "--process_id=1"),
        ],
        "--coordinator_address=a must be HOST:PORT",
    ),
    "a port that is none": (
        [
            *(TINY, "--workdir=x", "--coordinator_address=a:65536"),
            *("--num_processes=2", "--process_id=0"),
        ],
        "--coordinator_address=a:65536 must be HOST:PORT",
    ),
    "detected and given": (
        [TINY, "--workdir=x", "--distributed=auto", "--num_processes=2"],
        "--distributed=auto must be 'auto', and alone",
    ),
    "two configs": ([TINY, TINY], "--config=FILE is given twice; a run has one config"),
    "a file as workdir": (
        [TINY, "--workdir=README.md/run"],
        "--workdir=README.md/run: README.md is a file, and no folder",
    ),
    "not an int": (
        [TINY, "--config.mechanism.steps=1e3"],
        "config.mechanism.steps=1e3",
    ),
}


def dice(**changes):
    mechanism = {
        "name": "dpjax.mechanisms:DiceSgd",
        "clip_norm": 1.0,
        "clip_style": "flat",
        "error_clip_norm": None,
        "error_scale": "sum",
        "outer_norm": 2.0,
        "noise_multiplier": 4.0,
        "sampling": {"name": "dpjax.privacy:Poisson", "rate": 0.1},
        "steps": 12,
        "delta": 1e-5,
        "accounting": "outer_clip",
    }
    return {"mechanism": mechanism | changes}


ZERO = {
    "name": "dpjax.mechanisms:DpZero",
    "clip_norm": 1.0,
    "smoothing": 1e-3,
    "direction_seed": 0,
    "noise_multiplier": 4.0,
    "sampling": {"name": "dpjax.privacy:Poisson", "rate": 0.1},
    "steps": 12,
    "delta": 1e-5,
}


def banded(**changes):
    mechanism = {
        "name": "dpjax.mechanisms:BandMf",
        "clip_norm": 1.0,
        "clip_style": "flat",
        "noise_multiplier": 4.0,
        "bands": 4,
        "strategy": "mean_error",
        "sampling": {
            "name": "dpjax.privacy:CyclicPoisson",
            "cycle": 4,
            "rate": 0.4,
        },
        "steps": 12,
        "delta": 1e-5,
    }
    return {"mechanism": mechanism | changes}


def adaptive(**changes):
    mechanism = {
        "name": "dpjax.mechanisms:AdaptiveDpSgd",
        "initial_clip_norm": 1.0,
        "min_clip_norm": 0.01,
        "max_clip_norm": 10.0,
        "target_quantile": 0.5,
        "clip_learning_rate": 0.2,
        "count_share": 0.1,
        "noise_multiplier": 4.0,
        "sampling": {"name": "dpjax.privacy:Poisson", "rate": 0.1},
        "steps": 12,
        "delta": 1e-5,
    }
    return {"mechanism": mechanism | changes}


WRONG_VALUES = {
    "no patterns": (
        {"parameters.train": ".*"},
        "config.parameters.train='.*' must be a tuple of regular expressions",
    ),
    "start": (
        {"parameters.provenance": "pretrained"},
        "config.parameters.provenance='pretrained' is unknown",
    ),
    "weights from nowhere": (
        {
            "model": {
                "name": "dpjax.models.weights:exported",
                "model": {
                    "name": "dpjax.models.mlp:mlp",
                    "features": (),
                    "num_classes": 10,
                    "activation": "relu",
                },
                "path": "x",
                "fresh": (),
            }
        },
        "config.parameters.provenance='fresh' with weights from dpjax.models.weights:exp",
    ),
    "clip norm zero": ({"mechanism.clip_norm": 0.0}, "clip_norm=0.0 must be positive"),
    "clip norm negative": ({"mechanism.clip_norm": -1.0}, "clip_norm=-1.0 must be"),
    "clip style": ({"mechanism.clip_style": "layer"}, "clip_style='layer' is unknown"),
    "epsilon zero": (
        {"mechanism.epsilon": 0.0, "mechanism.noise_multiplier": None},
        "config.mechanism: epsilon=0.0 must be positive",
    ),
    "epsilon negative": (
        {"mechanism.epsilon": -3.0, "mechanism.noise_multiplier": None},
        "epsilon=-3.0 must be positive",
    ),
    "epsilon infinite": (
        {"mechanism.epsilon": float("inf"), "mechanism.noise_multiplier": None},
        "use the NonPrivate mechanism",
    ),
    "epsilon and noise": ({"mechanism.epsilon": 1.0}, "set exactly one of them"),
    "neither epsilon nor noise": (
        {"mechanism.noise_multiplier": None},
        "set exactly one of them",
    ),
    "noise negative": (
        {"mechanism.noise_multiplier": -1.0},
        "noise_multiplier=-1.0 must be finite and at least 0",
    ),
    "paper noise, not accepted": (
        dice(accounting="paper", error_clip_norm=1.0),
        "accounting='paper' gives an epsilon that attacks refute",
    ),
    "paper noise for an error clip norm below the clip norm": (
        dice(accounting="paper", error_clip_norm=0.5, accept_unproven_epsilon=True),
        "error_clip_norm=0.5 is below clip_norm=1.0",
    ),
    "outer clip without an outer norm": (
        dice(outer_norm=None),
        "outer_norm=None with accounting='outer_clip'",
    ),
    "outer norm below the clip norm": (
        dice(outer_norm=0.5),
        "outer_norm=0.5 must be at least clip_norm=1.0",
    ),
    "amplification asked of participations": (
        dice(accounting="k_participation", error_clip_norm=1.0),
        "use ShuffledFixed or FullBatch, or accounting='conservative'",
    ),
    "shuffled batches accounted as coins": (
        dice(
            accounting="conservative",
            error_clip_norm=1.0,
            sampling={"name": "dpjax.privacy:ShuffledFixed", "batch_size": 64},
        ),
        "sampling=ShuffledFixed has no analysis",
    ),
    "local steps without rounds": (
        {
            "mechanism": {
                "name": "dpjax.mechanisms:Diff2BvrLSgd",
                "clip_norm": 1.0,
                "difference_clip_norm": 1.0,
                "local_clip_norm": 1.0,
                "restart_every": 2,
                "noise_multiplier": 4.0,
                "noise_ratio": 1.0,
                "local_noise_ratio": 1.0,
                "sampling": {"name": "dpjax.privacy:FullBatch"},
                "steps": 12,
                "delta": 1e-5,
            }
        },
        "sampling=FullBatch() must be PeriodicPoisson(period=K, first_rate=1.0",
    ),
    "slopes over no distance": (
        {"mechanism": ZERO | {"smoothing": 0.0}},
        "config.mechanism: dpjax.mechanisms:DpZero: smoothing=0.0 must be positive",
    ),
    "secret directions": (
        {"mechanism": ZERO | {"direction_seed": None}},
        "direction_seed=None must be an integer; it is public",
    ),
    "memory budget without gradients": (
        {"mechanism": ZERO, "compute.memory_budget": 2**30},
        "DpZero takes none: use config.compute.microbatch_size",
    ),
    "correlated noise on batches without a rest": (
        banded(sampling={"name": "dpjax.privacy:Poisson", "rate": 0.1}),
        "use CyclicPoisson(cycle=4, rate=...)",
    ),
    "correlated noise on fresh shuffles": (
        banded(sampling={"name": "dpjax.privacy:ShuffledFixed", "batch_size": 64}),
        "with rate=1.0 for batches in a fixed order",
    ),
    "more bands than the cycle": (banded(bands=5), "or lower bands"),
    "more bands than steps": (banded(steps=3), "bands=4 exceeds steps=3"),
    "unknown strategy": (
        banded(strategy="sqrt"),
        "strategy='sqrt' is unknown; use one of mean_error, square_root",
    ),
    "cycle zero": (
        banded(sampling=banded()["mechanism"]["sampling"] | {"cycle": 0}),
        "cycle=0 must be an integer of at least 1",
    ),
    "first clip norm out of bounds": (
        adaptive(initial_clip_norm=20.0),
        "initial_clip_norm=20.0 must be between min_clip_norm=0.01 and max_clip_norm=10",
    ),
    "no budget for the count": (
        adaptive(count_share=0.0),
        "count_share=0.0 must be in (0, 1); for a constant clip norm use DpSgd",
    ),
    "all examples within the clip norm": (
        adaptive(target_quantile=1.0),
        "target_quantile=1.0 must be in (0, 1)",
    ),
    "delta one": ({"mechanism.delta": 1.0}, "delta=1.0 must be in (0, 1)"),
    "delta zero": ({"mechanism.delta": 0.0}, "delta=0.0 must be in (0, 1)"),
    "rate above one": ({"mechanism.sampling.rate": 1.5}, "rate=1.5 must be in (0, 1]"),
    "rate zero": ({"mechanism.sampling.rate": 0.0}, "rate=0.0 must be in (0, 1]"),
    "no steps": ({"mechanism.steps": 0}, "steps=0 must be an integer of at least 1"),
    "capacity below expected": (
        {
            "mechanism.sampling": {
                "name": "dpjax.privacy:TruncatedPoisson",
                "rate": 0.5,
                "capacity": 100,
            }
        },
        "capacity=100 is below the expected batch size 718.5",
    ),
    "batch larger than data": (
        {
            "mechanism.sampling": {
                "name": "dpjax.privacy:ShuffledFixed",
                "batch_size": 5000,
            }
        },
        "batch_size=5000 exceeds num_examples=1437",
    ),
    "unknown sampling": (
        {"mechanism.sampling.name": "dpjax.privacy:Poison"},
        "has no 'Poison'; did you mean 'Poisson'",
    ),
    "unknown optimizer": (
        {"optimizer.name": "optax:sdg"},
        "optax has no 'sdg'; did you mean 'sgd'",
    ),
    "unknown optimizer key": (
        {"optimizer.momentun": 0.9},
        "config.optimizer.momentun is unknown; did you mean 'momentum'",
    ),
    "optimizer key missing": (
        {"optimizer": {"name": "optax:sgd"}},
        "config.optimizer.learning_rate is missing",
    ),
    "unknown model module": (
        {"model.name": "dpjax.models.mamba:lm"},
        "there is no module 'dpjax.models.mamba'",
    ),
    "name without a colon": ({"model.name": "mlp"}, "must be 'module:attribute'"),
    "unknown activation": (
        {"model.activation": "gelu"},
        "activation='gelu'",
    ),
    "no spec": ({"model": 3}, "must be a group with a name"),
    "budget for an engine that does not plan": (
        {"compute.engine": "ghost", "compute.memory_budget": 2**30},
        "config.compute.memory_budget=1073741824 must be a positive number of bytes",
    ),
    "negative memory budget": (
        {"compute.memory_budget": -1},
        "config.compute.memory_budget=-1 must be a positive number of bytes",
    ),
    "unknown engine": (
        {"compute.engine": "vamp"},
        "config.compute.engine='vamp' is unknown; did you mean 'vmap'",
    ),
    "microbatch does not divide": (
        {"compute.microbatch_size": 48},
        "config.compute.microbatch_size=48 must divide physical_batch_size=64",
    ),
    "more devices than there are": (
        {"mesh.data": 16},
        "config.mesh: data=16 x fsdp=1 x model=1 needs 16 devices, and there are 8",
    ),
    "rows that the mesh does not divide": (
        {"mesh.data": 3},
        "config.compute.physical_batch_size=64 must be divisible by the 3 devices",
    ),
    "fsdp zero": ({"mesh.fsdp": 0}, "config.mesh.fsdp=0 must be an integer"),
    "rows that fsdp does not divide": (
        {"mesh.data": None, "mesh.fsdp": 4, "compute.physical_batch_size": 60},
        "config.mesh: physical_batch_size=60 must be divisible by the 8 devices",
    ),
    "rules none": (
        {"mesh.rules": None},
        "config.mesh.rules=None must be a tuple of rules, such as (('.*', 'largest'),)",
    ),
    "rules one word": (
        {"mesh.rules": "kernel"},
        "config.mesh.rules='kernel' must be a tuple of rules",
    ),
    "rule that splits unevenly": (
        {"mesh.fsdp": 4, "mesh.rules": (("head/bias", 0), (".*", None))},
        "of shape (10,) over fsdp=4; use another dimension, None, or 'largest' for fsdp",
    ),
    "model without rules": (
        {"mesh.model": 2},
        "config.mesh: model=2 needs rules that say what is split over it",
    ),
    "model with rules for others": (
        {"mesh.model": 2, "mesh.rules": TRANSFORMER},
        "config.mesh.rules: none splits a parameter of this model over model=2",
    ),
    "convolutions that would be divided": (
        {"mesh.fsdp": 2, "model": {"name": f"{__name__}:convolutional"}},
        "config.mesh: fsdp and model must be 1 for a loss with convolutions",
    ),
    "rule no pair": (
        {"mesh.rules": ("kernel",)},
        "config.mesh.rules: 'kernel' must be (regular expression, dimension over fsdp) or",
    ),
    "rule no dimension": (
        {"mesh.rules": (("kernel", "smallest"),)},
        "dimension='smallest' of 'kernel' must be a whole number (negative from the end), "
        "'largest' or None",
    ),
    "rules for other parameters": (
        {"mesh.data": 4, "mesh.fsdp": 2, "mesh.rules": (("conv", 0),)},
        "config.mesh.rules: no rule is for the parameter 'dense_0/bias'",
    ),
    "physical batch zero": (
        {"compute.physical_batch_size": 0},
        "config.compute.physical_batch_size=0 must be an integer of at least 1",
    ),
    "views zero": ({"augment.views": 0}, "config.augment.views=0 must be"),
    "average decay one": (
        {"evaluation.ema_decay": 1.0},
        "config.evaluation.ema_decay=1.0 must be in [0, 1)",
    ),
    "unknown writer": (
        {"run.writers": ("tensorbord",)},
        "config.run.writers='tensorbord' is unknown; did you mean 'tensorboard'",
    ),
    "private mechanism on public data": (
        {"data.provenance": "public"},
        "noise on public data protects nobody",
    ),
    "no noise on private data": (
        {"mechanism.noise_multiplier": 0.0},
        "nothing would protect the data",
    ),
    "moving average no number": (
        {"evaluation.ema_decay": "x"},
        "ema_decay='x' must be",
    ),
    "mechanism no group": ({"mechanism": 3}, "config.mechanism=3 must be a group"),
    "sampling no group": (
        {"mechanism.sampling": 3},
        "config.mechanism.sampling=3 must",
    ),
    "writers no tuple": ({"run.writers": 3}, "config.run.writers=3 must be a tuple"),
    "self-check no bool": ({"run.self_check": 1}, "self_check=1 must be True"),
    "flag no bool": ({"run.log_sensitive": "no"}, "log_sensitive='no' must be True"),
    "seed no int": ({"run.seed": 1.5}, "config.run.seed=1.5 must be an integer"),
    "unknown provenance": (
        {"data.provenance": "secret"},
        "config.data.provenance='secret' is unknown",
    ),
    "no privacy on private data": (
        {
            "mechanism": {
                "name": "dpjax.mechanisms:NonPrivate",
                "sampling": {"name": "dpjax.privacy:FullBatch"},
                "steps": 3,
                "delta": 1e-5,
            }
        },
        "nothing would protect the data",
    ),
    "missing group": ({"run": {}}, "config.run.seed is missing"),
    "missing data file": (
        {
            "data.source": {
                "name": "dpjax.data.arrays:npz",
                "path": "no/such.npz",
                "split": "train",
            }
        },
        "no/such.npz",
    ),
    "missing image folder": (
        {
            "data.source": {
                "name": "dpjax.data.images:image_folder",
                "path": "no/such",
                "split": "train",
                "cache": None,
            }
        },
        "no/such/train has no class folders",
    ),
    "unknown split": ({"data.source.split": "dev"}, "split='dev'"),
    "label out of range": (
        {"model.num_classes": 9},
        "config.data.source: a value of 'label' is outside [0, 9) (which one is not told",
    ),
    "label outside of an own model": (
        {"model": {"name": "tests.leaky:nine_outputs"}},
        "config.data.source: a value of 'label' is outside [0, 9) (which one is not told",
    ),
    "not a number in the data": (
        {"data.source": {"name": "tests.leaky:holed", "split": "train"}},
        "config.data.source: a value of 'image' is NaN or infinite (which one is not told",
    ),
    "classes in letters": (
        {"model.num_classes": "10"},
        "config.model.num_classes='10' must be an integer of at least 1",
    ),
    "clip norm that is true": (
        {"mechanism.clip_norm": True},
        "clip_norm=True: a number is wanted",
    ),
    "schedule for a number": (
        {"mechanism.clip_norm": {"name": "optax:constant_schedule", "value": 1.0}},
        "a number is wanted; public schedules: ScheduledDpSgd",
    ),
    "rate in letters": (
        {"mechanism.sampling.rate": "0.1"},
        "rate='0.1': a number is wanted",
    ),
    "no sampling": (
        {
            "mechanism.sampling": {
                "name": "dpjax.privacy.sampling:secret_seed",
                "seed": 1,
            }
        },
        "must be a sampling, such as dpjax.Poisson(rate=0.01)",
    ),
    "steps beyond the counter": (
        {"mechanism.steps": 2**31},
        "steps=2147483648 must be below 2**31",
    ),
    "budget in letters": (
        {"compute.memory_budget": "1e9"},
        "config.compute.memory_budget='1e9': a number is wanted",
    ),
    "seed that is true": (
        {"run.seed": True},
        "config.run.seed=True must be an integer",
    ),
    "a writer twice": (
        {"run.writers": ("tensorboard", "tensorboard")},
        "must be a tuple of different names",
    ),
    "learning rate negative": (
        {"optimizer.learning_rate": -1.0},
        "config.optimizer.learning_rate=-1.0 must be a number of at least 0",
    ),
    "no learning rate": (
        {"optimizer.learning_rate": None},
        "config.optimizer.learning_rate=None must be a number of at least 0",
    ),
    "a module without source": (
        {"data.source": {"name": "math:pi"}},
        "there is no module 'math'",
    ),
    "a type that cannot be called": (
        {"data.source": {"name": "dpjax.typing:Scalar"}},
        "dpjax.typing:Scalar: RuntimeError",
    ),
    "verify no bool": ({"run.verify": None}, "verify=None must be True or False"),
    "learning rate nan": (
        {"optimizer.learning_rate": float("nan")},
        "config.optimizer.learning_rate=nan must be finite",
    ),
    "evaluated on training data": (
        {"evaluation.source.split": "train"},
        "more than 5% of config.evaluation.source is in config.data.source",
    ),
    "splits overlap": (
        {"data.source.test_fraction": 0.1},
        "more than 5% of config.evaluation.source is in config.data.source",
    ),
    "metric of another model": (
        {"evaluation.metric.name": "tests.leaky:wrong_metric"},
        "config.evaluation.metric does not fit config.evaluation.source or the model: Typ",
    ),
    "a slip in a source of the user's": (
        {"data.source": {"name": "tests.leaky:misspelt_source", "split": "train"}},
        "tests.leaky:misspelt_source: KeyError: 'training' (leaky.py, line ",
    ),
    "a slip in a model of the user's": (
        {"model": {"name": "tests.leaky:misshapen", "num_classes": 10}},
        "(leaky.py, line ",
    ),
    "vector loss": (
        {"loss": {"name": "tests.leaky:vector_loss"}},
        "one floating-point scalar for ONE example",
    ),
}


def stderr_of(argv, capsys):
    status = main(argv)
    captured = capsys.readouterr()
    assert status == 2, captured
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("name", WRONG_FLAGS)
def test_wrong_flags_are_one_line(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv, message = WRONG_FLAGS[name]
    assert message in stderr_of(argv, capsys)


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_wrong_values_are_one_line_and_leave_nothing(
    name, capsys, monkeypatch, tmp_path
):
    changes, message = WRONG_VALUES[name]
    assert message in stderr_with(tiny(**changes), capsys, monkeypatch, tmp_path)
    assert not (tmp_path / "run").exists()


def stderr_with(config, capsys, monkeypatch, tmp_path):
    """Run the command on a config file that returns ``config``."""
    file = tmp_path / "wrong.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "inf, nan = float('inf'), float('nan')\n"
        "def get_config():\n"
        f"    return ConfigDict({config!r})\n"
    )
    monkeypatch.chdir(ROOT)
    return stderr_of([f"--config={file}", f"--workdir={tmp_path / 'run'}"], capsys)


CONFIG_FILES = {
    "it raises": (
        "def get_config():\n    return undefined\n",
        "name 'undefined' is not defined (wrong.py, line 2)",
    ),
    "it exits": (
        "def get_config():\n    raise SystemExit(3)\n",
        "3 (wrong.py, line 2)",
    ),
    "no function": ("x = 1\n", "the config file defines no get_config()"),
    "a plain dict": (
        "def get_config():\n    return {}\n",
        "get_config() returned a dict; it must be a ConfigDict",
    ),
}


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_wrong_config_files_are_one_line(name, capsys, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    text, message = CONFIG_FILES[name]
    (tmp_path / "wrong.py").write_text(text)
    found = stderr_of([f"--config={tmp_path / 'wrong.py'}", "--workdir=run"], capsys)
    assert found == f"error: {message}\n"


def test_a_memory_budget_that_nothing_fits_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    budget = "--config.compute.memory_budget=1"
    assert main([TINY, budget, f"--workdir={tmp_path}"]) == 2
    *_, error = capsys.readouterr().err.splitlines(keepends=True)
    assert error.startswith("error: memory_budget=1 bytes is too small: the leanest")
    assert error.count("\n") == 1


def test_a_corrupt_image_is_named_before_training(capsys, monkeypatch, tmp_path):
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = np.full((8, 8, 3), 40 * i, np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    bad = tmp_path / "images" / "train" / "dog" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    source = {
        "name": "dpjax.data.images:image_folder",
        "path": str(tmp_path / "images"),
        "cache": None,
    }
    config = tiny(
        **{
            "data.source": {**source, "split": "train"},
            "evaluation.source": {**source, "split": "test"},
        }
    )
    message = stderr_with(config, capsys, monkeypatch, tmp_path)
    assert "dog/1.png" in message
    assert not (tmp_path / "run").exists()


def test_none_on_the_command_line_unsets_a_key(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = ["--config.mechanism.epsilon=None", "--config.mechanism.noise_multiplier=9"]
    config = "--config=configs/digits_mlp_dpsgd.py"
    assert main([config, *flags, "--config.run.dry_run=True"]) == 0
    assert "noise multiplier  9.0000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        [TINY, "--workdir=x", "--config.mechanism.clip_norm=0"],
        [TINY, "--workdir=x", "--config.mechanism.sampling.rate=2"],
        [
            "--config=configs/digits_mlp_dicesgd.py",
            "--workdir=x",
            "--config.mechanism.accounting=paper",
        ],
        [
            "--config=configs/digits_mlp_bandmf.py",
            "--workdir=x",
            "--config.mechanism.bands=5",
        ],
        [TINY, "--workdir=x", "--config.optimizer.name=optax:sdg"],
        [TINY, "--workdir=x", "--config.model.name=dpjax.models.mlp:mpl"],
        [TINY, "--workdir=x", "--config.compute.engine=vamp"],
    ],
    ids=lambda argv: argv[-1],
)
def test_help_and_config_errors_do_not_import_jax(argv):
    code = (
        "import sys; from experiments.train import main; "
        f"status = main({argv!r}); "
        "heavy = {'jax', 'optax', 'flax', 'dp_accounting', 'scipy'} & set(sys.modules); "
        "print(status, sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = 0 if argv == ["--help"] else 2
    assert done.stdout.splitlines()[-1] == f"{expected} []", done.stdout + done.stderr


def test_divergence_stops_with_one_line_and_status_1(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    flags = [f"--workdir={tmp_path}", "--config.optimizer.learning_rate=1e38"]
    assert main([TINY, *flags]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the update of step")


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"),
        ValueError("RESOURCE_EXHAUSTED: Out of memory"),
        MemoryError("std::bad_alloc: Out of memory"),
    ],
)
def test_exhausted_memory_is_one_line_with_the_ways_out(
    error, capsys, monkeypatch, tmp_path
):
    def exhausted(*_):
        raise error

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(loop, "train", exhausted)
    assert main([TINY, f"--workdir={tmp_path / 'run'}"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: a device has too little memory: lower config.comp")
    assert told.endswith(": Out of memory\n")
    assert told.count("\n") == 1


def test_dry_run_prints_plan_and_card_and_trains_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert (
        main([TINY, "--config.run.dry_run=True", f"--workdir={tmp_path / 'run'}"]) == 0
    )
    printed = capsys.readouterr().out
    assert "610, of which 610 are trained" in printed
    assert "# Privacy card" in printed
    assert not (tmp_path / "run").exists()


def language_model(folder, **changes):
    """A byte-level GPT-2 on a file of text, with changes as of ``tiny``."""
    (folder / "text.txt").write_text("the quick brown fox " * 40)
    source = {
        "name": "dpjax.data.text:text_blocks",
        "path": str(folder / "text.txt"),
        "length": 8,
        "tokenizer": {
            "name": "dpjax.data.tokenizers:byte_level",
            "specials": ("<eos>",),
        },
    }
    model = {
        "name": "dpjax.models.gpt2:gpt2",
        "vocab_size": 257,
        "length": 8,
        "layers": 1,
        "width": 8,
        "heads": 2,
        "dtype": "float32",
        "scan": False,
        "remat": False,
    }
    text = {
        "data.source": {**source, "start": 0.0, "stop": 0.8},
        "evaluation.source": {**source, "start": 0.8, "stop": 1.0},
        "evaluation.provenance": "private",
        "evaluation.metric": {"name": "dpjax.models.losses:token_nats"},
        "loss": {"name": "dpjax.models.losses:causal_lm"},
        "model": model,
    }
    return tiny(**text | changes)


def pretrained(config, **changes):
    model = {
        "name": "dpjax.models.weights:pretrained",
        "model": config["model"],
        "path": str(ROOT / "tests/golden/hf/gpt2_a.safetensors"),
        "family": "gpt2",
        "fresh": (),
        "skip": (),
    }
    start = config["parameters"] | {"provenance": "public"}
    return {**config, "model": model | changes, "parameters": start}


WRONG_TEXT = {
    "vocabulary": (
        lambda folder: language_model(folder, **{"model.vocab_size": 100}),
        "config.data.source: a value of 'tokens' is outside [0, 100) (which one is not told",
    ),
    "positions": (
        lambda folder: language_model(folder, **{"model.length": 7}),
        "an example has 8 tokens, and the model length=7 positions",
    ),
    "heads": (
        lambda folder: language_model(folder, **{"model.heads": 3}),
        "dpjax.models.gpt2:gpt2: heads=3 must divide width=8",
    ),
    "weights of another model": (
        lambda folder: pretrained(language_model(folder)),
        "the weights do not fit the model: 12 tensors left over: transformer.h.1",
    ),
    "no such weights": (
        lambda folder: pretrained(language_model(folder), path="no/such/file/here"),
        "path='no/such/file/here' does not exist",
    ),
    "loss of labels": (
        lambda folder: language_model(
            folder,
            loss={"name": "dpjax.models.losses:classification", "label_smoothing": 0.0},
        ),
        "config.loss does not fit the data or the model: KeyError: 'label'; an example has ['",
    ),
}


@pytest.mark.parametrize("name", WRONG_TEXT)
def test_text_that_does_not_fit_its_model_is_one_line(
    name, capsys, monkeypatch, tmp_path
):
    make, message = WRONG_TEXT[name]
    assert message in stderr_with(make(tmp_path), capsys, monkeypatch, tmp_path)
    assert not (tmp_path / "run").exists()
