"""DP-SGD against error feedback at epsilon 3, over a grid of clip norms.

    python -m experiments.ablate experiments/sweeps/error_feedback.py:digits_tuning --out=DIR

Variants: ``digits_tuning`` and ``mnist_tuning`` try step sizes, with seeds of their own;
``digits`` repeats, with other seeds, what ``gather --choose=step`` kept in
``results/error_feedback/``, ``mnist`` what ``--choose=clip,step`` kept. MNIST is read from
``mnist.npz`` (Keras' layout) in the working directory.

A ``step`` is the learning rate times the clip norm, as the gradient of a clipped example is
about as long as that.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import digits_mlp_dpsgd
from experiments.sweeps.sweep import Cell, chosen, grid, seeded, task_of

BEST = "highest"
RESULTS = Path("experiments/results/error_feedback")
TUNING_SEEDS, SEEDS = (101, 102), (1, 2, 3, 4, 5)
EPSILON, DELTA = 3.0, 1e-5


class Task(NamedTuple):
    """What differs between the data sets.

    Attributes:
        rate, steps: Of Poisson sampling.
        batch_size: Of shuffled batches, for the analysis without amplification.
        feedback: C2 over C1 of that analysis, on the scale of sums.
        conservative: Noise multiplier of "conservative" with C2 = C1 at ``EPSILON``, as
            ``dpjax.calibrate`` finds it in a minute or two.
        clips: Clip norms.
        sizes: Step sizes to try, for each method.
    """

    rate: float
    steps: int
    batch_size: int
    feedback: float
    conservative: float
    clips: tuple[float, ...]
    sizes: dict[str, tuple[float, ...]]


TASKS = {
    "digits": Task(
        rate=0.25,
        steps=200,
        batch_size=359,
        feedback=1.0,
        conservative=14.7533,
        clips=(0.0625, 0.25, 1.0),
        sizes={
            "DP-SGD": (0.5, 1.0, 2.0, 4.0),
            "DiceSGD outer_clip": (0.25, 0.5, 1.0, 2.0),
            "two channels": (0.25, 0.5, 1.0, 2.0),
            "DiceSGD k_participation": (0.06, 0.12, 0.25, 0.5),
            "DiceSGD conservative": (0.06, 0.12, 0.25, 0.5),
            "DiceSGD paper, claimed": (0.06, 0.12, 0.25, 0.5, 1.0, 2.0),
        },
    ),
    "mnist": Task(
        rate=1024 / 60_000,
        steps=150,
        batch_size=1024,
        feedback=1024.0,
        conservative=11.4518,
        clips=(0.25, 1.0),
        sizes={
            "DP-SGD": (8.0, 16.0, 32.0, 64.0),
            "DiceSGD outer_clip": (4.0, 8.0, 16.0, 32.0),
            "two channels": (4.0, 8.0, 16.0, 32.0),
            "DiceSGD k_participation": (1.0, 2.0, 4.0),
            "DiceSGD conservative": (0.06, 0.25, 1.0),
            "DiceSGD paper, claimed": (0.06, 0.12, 0.25, 0.5, 1.0, 4.0),
        },
    ),
}


def config(variant: str) -> ConfigDict:
    """Return the recipe of digits, or the same for MNIST."""
    task = task_of(TASKS, variant)
    base = digits_mlp_dpsgd.get_config()
    if variant.startswith("mnist"):
        mnist = {"name": "dpjax.data.arrays:npz", "path": "mnist.npz"}
        base.data.source = ConfigDict({**mnist, "split": "train"})
        base.evaluation.source = ConfigDict({**mnist, "split": "test"})
        base.evaluation.batch_size = 1000
    # Nearly every batch fits into one chunk.
    base.compute.physical_batch_size = 1152 if variant.startswith("mnist") else 448
    base.run.log_every = base.run.eval_every = base.run.checkpoint_every = task.steps
    return base


def cells(variant: str) -> Iterator[Cell]:
    """Yield the runs of a variant."""
    task = task_of(TASKS, variant)
    if variant.endswith("_tuning"):
        labels: list[dict[str, Any]] = [
            {"method": method, **values}
            for method, sizes in task.sizes.items()
            for values in grid(clip=task.clips, step=sizes)
        ]
        # MNIST is slow, and its scores vary less.
        seeds = TUNING_SEEDS[:1] if variant.startswith("mnist") else TUNING_SEEDS
    else:
        labels, seeds = chosen(RESULTS / f"{variant}_tuned.json"), SEEDS
    for label in labels:
        yield from seeded([Cell(label, _overrides(task, **label))], seeds)


def _overrides(task: Task, *, method: str, clip: float, step: float) -> dict[str, Any]:
    return {
        "mechanism": _mechanism(task, method, clip),
        "optimizer": {
            "name": "dpjax.optimizers:tunable_sgd",
            "learning_rate": step / clip,
        },
    }


def _mechanism(task: Task, method: str, clip: float) -> dict[str, Any]:
    shared = {
        "clip_norm": clip,
        "epsilon": EPSILON,
        "noise_multiplier": None,
        "sampling": {"name": "dpjax.privacy:Poisson", "rate": task.rate},
        "steps": task.steps,
        "delta": DELTA,
    }
    dice = {
        "name": "dpjax.mechanisms:DiceSgd",
        "clip_style": "flat",
        "error_clip_norm": clip,
        "error_scale": "sum",
        "outer_norm": None,
        "accept_unproven_epsilon": False,
        **shared,
    }
    match method:
        case "DP-SGD":
            name = "dpjax.mechanisms:DpSgd"
            return {"name": name, "clip_style": "flat", **shared}
        case "two channels":
            return {
                "name": "dpjax.mechanisms:PrivatizedErrorFeedback",
                "outer_norm": 2 * clip,
                "residual_share": 0.2,
                "memory_rate": 0.1,
                **shared,
            }
        case "DiceSGD outer_clip":
            outer = {"outer_norm": 2 * clip, "error_clip_norm": None}
            return {**dice, "accounting": "outer_clip", **outer}
        case "DiceSGD k_participation":
            return {
                **dice,
                "accounting": "k_participation",
                "error_clip_norm": task.feedback * clip,
                "outer_norm": 2 * clip,
                "sampling": {
                    "name": "dpjax.privacy:ShuffledFixed",
                    "batch_size": task.batch_size,
                },
            }
        case "DiceSGD conservative":
            noise = {"epsilon": None, "noise_multiplier": task.conservative}
            return {**dice, "accounting": "conservative", **noise}
        case _:
            claim = {"accounting": "paper", "accept_unproven_epsilon": True}
            return {**dice, **claim, "error_scale": "mean"}
