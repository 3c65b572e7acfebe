"""DIFF2 (Murata and Suzuki 2023, arXiv 2302.03884): noise on gradient differences.

From the paper: the two clipped queries with their radii, the restarts, the running
estimate, noise at the workers (Algorithms 1 to 3). Ours: noise at a trusted server, the
add/remove accounting by exact composition of two schedules, and the closed forms of the
split.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

from dpjax.checks import check_positive_int
from dpjax.mechanisms import recursion
from dpjax.mechanisms.base import check_kinds, check_plan
from dpjax.privacy.sampling import FullBatch, Sampling

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from dpjax.clipping import Query
    from dpjax.mechanisms.mathematics.differences import Diff2State
    from dpjax.privacy.sensitive import ClippedSum
    from dpjax.typing import Key, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diff2:
    """Release a running gradient estimate made of noisy full-batch differences.

    With ``clip(v, C) = v min(1, C/|v|)``, step t releases v_t, where at restarts (every
    ``restart_every``-th step, from the first on) and at the other steps

        N v_t = sum_i clip(g_i(x_t), C1) + N(0, (z1 C1)^2)
        N v_t = sum_i clip(g_i(x_t) - g_i(x_{t-1}), R_t) + N(0, (z2 R_t)^2) + N v_{t-1}

    with the radius ``R_t = C2 |x_t - x_{t-1}|``, which past outputs determine. If the
    parameters did not move, radius and noise are 0 and ``v_t = v_{t-1}``.

    Sensitivity: each sum moves by at most its radius (C1 or R_t) when one example is added
    or removed (up to float32 rounding of the sum); the divisor N is public.

    State: ``dpjax.mechanisms.mathematics.differences.Diff2State``, the estimate and the last
    parameters. Both are outputs of releases, no more secret than the parameters, and cost two
    copies of them.

    Workers: with P > 1 worker p sends ``message``, the sum of clipped vectors of its shard
    with noise of its own, and the server adds up. Examples are clipped one by one, to radii
    that all know, so sums over shards add up to the sum over all: ``release`` of the total
    is, but for rounding, the sum of the P messages over N, and it draws the noise of each
    worker. It has sqrt(P) times the noise of a trusted server, at the same epsilon, which
    holds against the server too: one example is in one shard (whichever, as long as adding
    or removing it moves no other), whose message has sensitivity R_t and noise z R_t. For
    shards of equal size this is the paper's mean of the workers' means; of others it is
    the mean over examples.

    The noise of a restart is in all estimates of its period, so it does not average out
    over steps as that of DP-GD does: DIFF2 is for few, long steps.

    Attributes:
        clip_norm: C1, L2 bound on each example's gradient at restarts.
        difference_clip_norm: C2, bound on each example's difference per unit of
            ``|x_t - x_{t-1}|``: about how smooth the loss of one example is.
        restart_every: T; with 1 this is DP-GD.
        noise_multiplier: z1, noise at restarts in units of C1.
        noise_ratio: z2 / z1; see ``dpjax.mechanisms.recursion.optimal_noise_ratio``.
        noisy_workers: P, how many hold a shard of the data each and add noise to its sum
            before the sums meet; see above. 1 for noise added once, by a trusted server or
            under secure aggregation.
        sampling: ``FullBatch()``.
        steps, num_examples, delta: See ``Mechanism``.

    Raises:
        ValueError: A field out of range, named with the fix.
    """

    private: ClassVar[bool] = True

    clip_norm: float
    difference_clip_norm: float
    restart_every: int
    noise_multiplier: float
    noise_ratio: float
    noisy_workers: int
    sampling: Sampling
    steps: int
    num_examples: int
    delta: float

    def __post_init__(self) -> None:
        check_kinds(self)
        recursion.check(self)
        check_positive_int("restart_every", self.restart_every)
        check_positive_int("noisy_workers", self.noisy_workers)
        if not isinstance(self.sampling, FullBatch):
            raise ValueError(
                f"sampling={self.sampling} must be FullBatch(): the differences of Diff2 "
                "are over all examples; for Poisson batches use SpiderBoost"
            )
        check_plan(self)
        if self.noisy_workers > self.num_examples:
            raise ValueError(
                f"noisy_workers={self.noisy_workers} exceeds num_examples="
                f"{self.num_examples}; each worker needs a shard of the data"
            )

    @property
    def expected_batch_size(self) -> float:
        """The public constant that divides each released sum."""
        return self.sampling.expected_batch_size(self.num_examples)

    @property
    def steps_per_round(self) -> int:
        """Every step is a round: there are no local ones."""
        return 1

    def sampling_of(self, phase: str) -> Sampling:
        """Return the full batch."""
        del phase
        return self.sampling

    def multiplier(self, phase: str) -> float:
        """Return the noise multiplier of a phase: what is accounted."""
        return recursion.multiplier(self, phase)

    def noise_stddev(self, phase: str, radius: "float | Scalar") -> "float | Scalar":
        """Return the standard deviation of the noise on a sum clipped to ``radius``."""
        return self.multiplier(phase) * math.sqrt(self.noisy_workers) * radius

    def event(self, steps: int | None = None) -> "DpEvent":
        """Return the Gaussians of ``steps`` (all, by default), restarts apart."""
        return recursion.event(self, self.steps if steps is None else steps)

    def caveats(self, steps: int) -> tuple[str, ...]:
        """Return none: epsilon is proven."""
        del steps
        return ()

    def init(self, params: "Params") -> "Diff2State":
        """Return the state before the first step."""
        return recursion.init(params)

    def phase(self, step: int) -> str:
        """Return "restart" or "difference"."""
        return recursion.phase(self, step)

    def radius(
        self, phase: str, params: "Params", state: "Diff2State"
    ) -> "float | Scalar":
        """Return the clip norm of a step of this phase at ``params``: C1 or R_t."""
        if phase == "restart":
            return self.clip_norm
        return self.difference_clip_norm * recursion.moved(params, state)

    def query(self, phase: str, params: "Params", state: "Diff2State") -> "Query":
        """Ask for the gradient, or for its difference from that of the last step."""
        return recursion.query(self, phase, params, state)

    def release(
        self,
        clipped: "ClippedSum",
        state: "Diff2State",
        params: "Params",
        *,
        key: "Key",
        step: "int | Scalar",
    ) -> "tuple[Params, Diff2State]":
        """Return the estimate; NaN if the sum is not the one asked for at ``step``."""
        return recursion.release(
            self,
            clipped,
            state,
            params,
            key=key,
            step=step,
            workers=self.noisy_workers,
        )

    def message(
        self,
        clipped: "ClippedSum",
        state: "Diff2State",
        params: "Params",
        *,
        key: "Key",
        step: "int | Scalar",
        worker: int,
    ) -> "Params":
        """Return what one worker sends: the noisy sum over its shard, like params.

        Args:
            clipped: The sum over the shard, as ``query`` asks for it.
            state: That of all workers.
            params: Likewise.
            key: Root noise key. Workers that do not trust each other draw their own.
            step: Which release this is.
            worker: In [0, noisy_workers).

        Returns:
            A sum that may be shown; all NaN if it is not the one asked for at ``step``.

        Raises:
            ValueError: There is no such worker.
        """
        if worker not in range(self.noisy_workers):
            raise ValueError(
                f"worker={worker} must be in [0, noisy_workers={self.noisy_workers})"
            )
        return recursion.noisy_sum(
            self,
            clipped,
            state,
            params,
            key=key,
            step=step,
            workers=self.noisy_workers,
            senders=range(worker, worker + 1),
        )

    def diagnose(self, state: "Diff2State") -> dict[str, float]:
        """Return nothing: the state is public."""
        del state
        return {}
