"""What is recorded of steps: every release at once, the rest at pauses of the loop."""

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dpjax.parallel import processes
from dpjax.privacy.sensitive import PerExample, reveal
from dpjax.training.ledger import Ledger
from dpjax.training.step import Released


class Pause(NamedTuple):
    """What is due after a step, beside a line of the log.

    Attributes:
        score: Whether to evaluate.
        save: Whether to save a checkpoint.
        accounted: The step up to which card and epsilon account.
    """

    score: bool
    save: bool
    accounted: int


def pause_after(
    step: int, run: Mapping[str, Any], *, last: int, stop: bool
) -> Pause | None:
    """Return what is due after ``step`` steps of ``last``, None if nothing is.

    What a run reports before it is evaluated or saved is accounted as if it had come so
    far: an accountant takes seconds, and would hold up steps that take less if every line
    of the log had its own.

    Args:
        step: How many steps have been taken.
        run: The config's group of this name.
        last: How many are planned.
        stop: Whether the run is stopped here.
    """
    ends = step == last
    score = ends or step % run["eval_every"] == 0
    save = ends or stop or step % run["checkpoint_every"] == 0
    if not (score or save or step % run["log_every"] == 0):
        return None
    if stop:
        return Pause(score, save, accounted=step)
    rounds = (run["eval_every"], run["checkpoint_every"])
    ahead = (-(-step // every) * every for every in rounds)
    return Pause(score, save, accounted=min(last, *ahead))


def record(ledger: Ledger, released: Released) -> None:
    """Write to the ledger what a step has released.

    Raises:
        FloatingPointError: Training diverged.
        NoiseReuseError: A replayed step came out differently.
    """
    step = int(released.step)
    if not math.isfinite(float(released.update_norm)):
        raise FloatingPointError(
            f"the update of step {step} is not finite: training diverged (lower the "
            "learning rate), or something changed the clipped sum before its release"
        )
    ledger.record(step, int(released.fingerprint))


def summarise(
    statistics: list[PerExample | None], facts: Mapping[str, float]
) -> dict[str, float]:
    """Return un-noised statistics of the last batch, and other facts. All are private."""
    found = {"batch_size": 0.0, **facts}
    revealed = [reveal(part) for part in statistics if part is not None]
    if revealed:
        columns = {
            name: np.concatenate([processes.to_host(part[name]) for part in revealed])
            for name in revealed[0]
        }
        mask = columns["mask"]
        found |= {
            "batch_size": float(mask.sum()),
            "loss": float(columns["losses"][mask].mean()),
            "norm_median": float(np.median(columns["norms"][mask])),
            "nonfinite": float(columns["nonfinite"].sum()),
        }
    return {f"sensitive/{name}": value for name, value in found.items()}


class Clock:
    """Throughput since the last report, in expected examples: real sizes are private."""

    def __init__(self, expected_batch_size: float, step: int) -> None:
        self._expected = expected_batch_size
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begin anew after ``step`` steps."""
        self._step, self._time = step, time.perf_counter()

    def examples_per_second(self, step: int) -> float:
        """Return the throughput of the steps from the last restart to ``step``."""
        seconds = time.perf_counter() - self._time
        return (step - self._step) * self._expected / seconds
