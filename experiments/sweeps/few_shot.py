"""Few-shot classification of five private classes: shots, epsilon, and what is trained.

    python -m experiments.ablate experiments/sweeps/few_shot.py:tuning --out=DIR

Before it, prepare ``runs/few_shot`` and run the variant ``pretrain`` of
configs/cifar10_few_shot.py. Variants: ``tuning`` tries learning rates on the PUBLIC classes,
25 shots, epsilon 8, which costs the private ones nothing; ``grid`` takes, for all shots and
epsilons, what ``gather --choose=lr`` kept in ``results/few_shot/``. Scores are of the first
200 test images of each class.

Epsilon "inf" is the same full-batch Adam without clipping and noise. The training images
are the first of each class: seeds differ in the head's start and in the noise.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import cifar10_few_shot as recipe
from configs import common
from experiments.sweeps.sweep import Cell, chosen, grid, seeded

BEST = "highest"
FOLDER, TESTED = "runs/few_shot", 200
RESULTS = Path("experiments/results/few_shot")
TUNING_SEEDS, SEEDS = (101,), (1, 2, 3)
SHOTS, EPSILONS, PARTS = (5, 25, 100), (1.0, 8.0, "inf"), ("head", "film", "all")
RATES = {
    "head": (0.01, 0.03, 0.1, 0.3),
    "film": (0.003, 0.01, 0.03, 0.1),
    "all": (0.0005, 0.002, 0.008, 0.03),
}


def config(variant: str) -> ConfigDict:
    """Return the recipe, scored once, at its end."""
    if variant not in ("tuning", "grid"):
        raise ValueError(f"variant={variant!r} is unknown; tuning or grid")
    base = recipe.get_config(f"head,{FOLDER}")
    if variant == "tuning":
        # Still "private" in the config: noise on what is declared public is refused.
        for source in (base.data.source.source, base.evaluation.source):
            source.path = f"{FOLDER}/public"
    base.evaluation.source = few_shots(base.evaluation.source, TESTED)
    run = base.run
    run.log_every = run.eval_every = run.checkpoint_every = recipe.STEPS
    return base


def cells(variant: str) -> Iterator[Cell]:
    """Yield the runs of a variant."""
    if variant == "tuning":
        labels: list[dict[str, Any]] = [
            {"shots": 25, "epsilon": 8.0, "parts": parts, "lr": lr}
            for parts, rates in RATES.items()
            for lr in rates
        ]
        seeds = TUNING_SEEDS
    else:
        rates = {c["parts"]: c["lr"] for c in chosen(RESULTS / "tuned.json")}
        labels = [
            {**values, "lr": rates[values["parts"]]}
            for values in grid(parts=PARTS, epsilon=EPSILONS, shots=SHOTS)
        ]
        seeds = SEEDS
    for label in labels:
        yield from seeded([Cell(label, _overrides(**label))], seeds)


def few_shots(source: ConfigDict, per_class: int) -> ConfigDict:
    """Return the spec of the first examples of each class."""
    name = "dpjax.data.arrays:few_shots"
    return ConfigDict({"name": name, "source": source, "per_class": per_class})


def _overrides(
    *, shots: int, epsilon: float | str, parts: str, lr: float
) -> dict[str, Any]:
    examples = recipe.CLASSES * shots
    return {
        "data.provenance": "public" if isinstance(epsilon, str) else "private",
        "data.source.per_class": shots,
        "parameters.train": recipe.TRAIN[parts],
        "mechanism": _mechanism(epsilon, examples).to_dict(),
        "optimizer": common.adam(lr).to_dict(),
        "compute.physical_batch_size": examples,
    }


def _mechanism(epsilon: float | str, examples: int) -> ConfigDict:
    if isinstance(epsilon, str):
        return common.non_private(
            batch_size=examples, steps=recipe.STEPS, delta=recipe.DELTA
        )
    return recipe.full_batch(epsilon)
