"""The only training loop. Read it from top to bottom: it is the whole system."""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpjax import config as configs
from dpjax import processes, report, terminal
from dpjax.about import about, file_digest
from dpjax.accounting import epsilon
from dpjax.audit.self_check import self_check
from dpjax.audit.verify import verify
from dpjax.checkpoint import Checkpoints, export
from dpjax.clipping import Query
from dpjax.data.batches import StepBatch, batches
from dpjax.entropy import entropy
from dpjax.evaluate import evaluator
from dpjax.experiment import Experiment, build_experiment, learning_rate
from dpjax.fingerprint import combined_fingerprint
from dpjax.ledger import Ledger
from dpjax.metrics import Progress, writers
from dpjax.noise import root_key
from dpjax.optimizers import evaluation_params
from dpjax.partition import merge, with_frozen
from dpjax.sensitive import ClippedSum, PerExample, reveal
from dpjax.sharding import Layout
from dpjax.startup import check_parts, starts
from dpjax.transforms import PrivateState, private
from dpjax.typing import Batch, Key, Params, Scalar


class TrainState(NamedTuple):
    """All that a run needs to go on. Secret: it holds keys and the sampling seed.

    Attributes:
        params: The parameters that are trained.
        private: State of mechanism and optimizer; its ``step`` is the only counter.
        average: Moving average of what the optimizer says is evaluated, the params by
            default, in float32 at least; () if none is kept.
        loss_key: Randomness inside the loss (dropout, augmentation).
        init_key: Randomness of the starting parameters; the frozen ones, which are not
            kept here, are made from it again.
        sampling_seed: ``uint32[4]``, 128 bits.
    """

    params: Params
    private: PrivateState
    average: Params | tuple[()]
    loss_key: Key
    init_key: Key
    sampling_seed: jax.Array

    def __repr__(self) -> str:
        return "TrainState(secret: holds keys and the sampling seed)"


class Released(NamedTuple):
    """What one step made public: its number, fingerprint, norm of the update, clip norm.

    The noise is a multiple of the clip norm, which therefore has to follow from releases.
    """

    step: Scalar
    fingerprint: Scalar
    update_norm: Scalar
    clip_norm: Scalar


def plan(config: Mapping[str, Any]) -> str:
    """Return the plan and the card of a run, without training.

    Raises:
        ConfigError: The config is wrong.
    """
    experiment = build_experiment(config)
    mechanism = experiment.mechanism
    trained, frozen = (_size(part) for part in check_parts(experiment))
    _tell_operator(config, experiment)
    start = report.start_block(config, mechanism, trained=trained, frozen=frozen)
    found = experiment.inspection
    card = report.card_of(config, mechanism, mechanism.steps, inspection=found)
    if config["run"]["self_check"]:
        start = f"{self_check(experiment)}\n\n{start}"
    return (
        f"{start}\n\nIf all {mechanism.steps} steps are taken:\n\n{card.to_markdown()}"
    )


class Interrupted(Exception):
    """SIGTERM or SIGINT came; the state was saved first."""


def train(config: Mapping[str, Any], workdir: Path) -> TrainState:
    """Train as ``config`` says, or go on with the run that ``workdir`` holds.

    Args:
        config: Plain dicts; see ``dpjax.config``.
        workdir: Receives the resolved config, checkpoints, ledger, metrics, card and
            export.

    Returns:
        The state after the last planned step.

    Raises:
        ConfigError: The config is wrong, or ``workdir`` holds a run of another one.
        SelfCheckError: ``run.self_check`` found a part that breaks the guarantee, or
            ``run.verify`` an engine that is wrong for this loss.
        CheckpointError: There are checkpoints, but none is usable.
        NoiseReuseError: A replayed step came out differently.
        FloatingPointError: Training diverged.
        Interrupted: A signal came.
    """
    experiment = build_experiment(config)
    shapes = check_parts(experiment)
    mechanism, run = experiment.mechanism, config["run"]
    metric, score = report.metric_name(config), math.nan
    identity = report.identity(config, mechanism, experiment.data_fingerprint)
    _check_same_everywhere(identity)
    layout, is_first = experiment.layout, processes.is_first()
    if is_first:
        _tell_operator(config, experiment)
    if run["self_check"]:
        passed = self_check(experiment)
        if is_first:
            print(passed)
    noise_key = processes.of_first(root_key(run["seed"]))
    transform = private(mechanism, experiment.optimizer, noise_key=noise_key)
    with (
        _open_ledger(workdir, layout) as ledger,  # first: it locks the workdir
        Checkpoints(workdir / "checkpoints", keep=run["keep_checkpoints"]) as saved,
    ):
        before = saved.metadata()
        _check_same_run(before, identity, workdir)
        fresh = init_state(config, experiment, transform)
        start, state = saved.restore(fresh) or (0, fresh)
        frozen = frozen_params(experiment, state)
        identity["frozen"] = int(jax.jit(combined_fingerprint)(frozen))
        _check_same_frozen(before, identity, workdir)
        ledger.check_complete(start)
        ledger.check_layout(start)
        if saved.latest is None:
            ledger.check_empty()
            if (workdir / "export").exists():
                raise configs.ConfigError(f"{workdir} holds the export of another run")
            if is_first:
                text = report.config_text(config, mechanism)
                (workdir / "config.json").write_text(text)
            # Before any release, so that its keys cannot be lost and drawn anew.
            saved.save(0, state, metadata=identity, wait=True)
        if is_first:
            sizes = {"trained": _size(shapes[0]), "frozen": _size(shapes[1])}
            print(report.start_block(config, mechanism, **sizes))

        train_step = make_train_step(config, experiment, transform, frozen)
        rate = learning_rate(config["optimizer"])
        if run["verify"] and mechanism.private and start < mechanism.steps:
            size = config["compute"]["physical_batch_size"]
            verify(experiment, train_step, state, physical_batch_size=size)
        facts = about(
            config,
            shapes,
            data_fingerprint=experiment.data_fingerprint,
            secret=np.asarray(state.sampling_seed).tobytes(),
        )

        def card_at(releases: int) -> report.PrivacyCard:
            found = experiment.inspection
            return report.card_of(config, mechanism, releases, facts, found)

        evaluate = evaluator(
            experiment.metric,
            batch_size=config["evaluation"]["batch_size"],
            layout=layout,
        )
        stream = batches(
            experiment.source,
            mechanism,
            seed=sampling_seed(state),
            physical_batch_size=config["compute"]["physical_batch_size"],
            start=start,
            rows=layout.rows(config["compute"]["physical_batch_size"]),
        )
        with (
            contextlib.closing(stream),
            writers(
                run["writers"], workdir, resume_step=start, silent=not is_first
            ) as writer,
            Progress(mechanism.steps, start=start, silent=not is_first) as progress,
            processes.interruptions() as interrupted,
        ):
            previous, clock = None, _Clock(mechanism.expected_batch_size, start)
            accounted = 0
            for batch in stream:
                state, released, statistics = train_step(state, batch)
                # The device works on this step while the host records the one before.
                _record(ledger, previous)
                previous = released

                step = batch.step + 1
                last, stop = step == mechanism.steps, interrupted(step)
                log = last or step % run["log_every"] == 0
                score_now = last or step % run["eval_every"] == 0
                save = last or stop or step % run["checkpoint_every"] == 0
                if not (log or score_now or save):
                    continue
                # Nothing that depends on a release is written before the ledger and the
                # card tell of it.
                _record(ledger, released)
                previous = None
                # The accountant takes its time, which is none of the steps'.
                speed = {"examples/s": clock.examples_per_second(step)}
                scalars = {}
                if step > accounted or stop:
                    accounted = (
                        step if stop else _next_pause(step, run, last=mechanism.steps)
                    )
                    releases = max(accounted, ledger.releases)
                    if is_first:
                        card_at(releases).write(workdir)
                scalars["epsilon"] = epsilon(mechanism, steps=accounted)
                scalars["update_norm"] = float(released.update_norm)
                if mechanism.private:
                    scalars["clip_norm"] = float(released.clip_norm)
                if run["log_sensitive"]:
                    found = mechanism.diagnose(state.private.mechanism)
                    scalars |= summarise(statistics, found | speed)
                if score_now:
                    params = evaluated_params(state, frozen)
                    score = evaluate(params, experiment.held_out)
                    scalars[metric] = score
                writer.write(step, scalars)
                shown = {} if rate is None else {"lr": rate(batch.step)}
                # Not to the writers: it depends on the sizes of the batches.
                progress.update(step, speed | scalars | shown)
                if save:
                    ledger.sync()
                    saved.save(step, state, metadata=identity)
                if stop and not last:
                    saved.wait()
                    raise Interrupted(f"saved step {step} of {mechanism.steps}")
                clock.restart(step)

        params = evaluated_params(state, frozen)
        if math.isnan(score):  # The run was complete before it was resumed.
            score = evaluate(params, experiment.held_out)
        params = processes.to_host(params)
        if is_first:
            folder, card = workdir / "export", card_at(mechanism.steps)
            if not (folder / "params.npz").exists():
                names = report.parameter_names(state.params, frozen)
                export(folder, params, card.files() | names)
            digest = file_digest(folder / "params.npz")
            facts = dataclasses.replace(facts, parameters=digest)
            card = dataclasses.replace(card, about=facts)
            card.write(folder)
            card.write(workdir)
            print(report.end_block(card, {metric: score}, workdir))
    return state


def _tell_operator(config: Mapping[str, Any], experiment: Experiment) -> None:
    found = report.inspected(experiment.inspection)
    terminal.tell(found, private=config["data"]["provenance"] == "private")


def _next_pause(step: int, run: Mapping[str, Any], *, last: int) -> int:
    """Return the next step, from this one on, that is evaluated, saved or the last.

    What a run reports before is accounted as if it had come so far: an accountant takes
    seconds, and would hold up steps that take less if every line of the log had its own.
    """
    rounds = (run["eval_every"], run["checkpoint_every"])
    return min(last, *(-(-step // every) * every for every in rounds))


class TrainStep(NamedTuple):
    """One training step: query, accumulate over chunks, release, update.

    A batch of any size is a number of chunks of one shape, so each function is compiled
    once for each phase, whatever sizes the sampler draws. Each device has a partial sum of
    its own until all chunks are in.

    Attributes:
        place: Spreads the rows of a chunk over the devices.
        phase: Step number -> phase, a static argument of the next two.
        begin: ``(phase, state) -> `` for each device the sum over no examples.
        accumulate: ``(phase, state, sums, batch, frozen) -> `` sums and statistics.
        finish: ``(state, sums) -> `` the next state and what was released.
        frozen: Parameters that are not trained.
    """

    place: Callable[[Batch], Batch]
    phase: Callable[[int], str]
    begin: Callable[..., ClippedSum]
    accumulate: Callable[..., tuple[ClippedSum, PerExample | None]]
    finish: Callable[..., tuple[TrainState, Released]]
    frozen: Params

    def __call__(
        self, state: TrainState, batch: StepBatch
    ) -> tuple[TrainState, Released, list[PerExample | None]]:
        """Return the next state, what was released, and statistics of each chunk."""
        phase = self.phase(batch.step)
        sums, statistics = self.begin(phase, state), []
        for chunk in batch.chunks:
            rows = self.place(chunk)
            sums, per_example = self.accumulate(phase, state, sums, rows, self.frozen)
            statistics.append(per_example)
        state, released = self.finish(state, sums)
        return state, released, statistics


def make_train_step(
    config: Mapping[str, Any],
    experiment: Experiment,
    transform: Any,  # optax types know trees of arrays only, not ClippedSum
    frozen: Params = (),
) -> TrainStep:
    """Compile the parts of a training step. A state is donated to the next one."""
    mechanism, layout = experiment.mechanism, experiment.layout
    keep_statistics = config["run"]["log_sensitive"]
    decay = config["evaluation"]["ema_decay"]

    def query(phase: str, state: TrainState) -> Query:
        return mechanism.query(phase, state.params, state.private.mechanism)

    def add(
        shared: tuple[Query, Key, Params], split: tuple[ClippedSum, Batch]
    ) -> tuple[ClippedSum, PerExample | None]:
        (asked, key, frozen), (sums, batch) = shared, split
        total = sums.only()
        # A radius that is computed from the state may be rounded otherwise in another
        # program: all chunks are clipped to the one of the empty sum.
        asked = dataclasses.replace(asked, clip_norm=total.l2_bound)

        loss = with_frozen(experiment.loss, frozen)
        clipped, per_example = experiment.engine(loss, asked, batch, key)
        sums = total.merge(clipped).stacked(1)
        return sums, per_example if keep_statistics else None

    @functools.partial(jax.jit, static_argnums=0, out_shardings=layout.by_row)
    def begin(phase: str, state: TrainState) -> ClippedSum:
        return query(phase, state).empty().stacked(layout.devices)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
    def accumulate(
        phase: str,
        state: TrainState,
        sums: ClippedSum,
        batch: Batch,
        frozen: Params = (),
    ) -> tuple[ClippedSum, PerExample | None]:
        key = jax.random.fold_in(state.loss_key, state.private.step)
        # Frozen parameters are arguments: constants would be copied into the program.
        shared = (query(phase, state), key, frozen)
        return layout.on_each(add)(shared, (sums, batch))

    @functools.partial(jax.jit, donate_argnums=0)
    def finish(state: TrainState, sums: ClippedSum) -> tuple[TrainState, Released]:
        step = state.private.step
        # The only time that anything as large as a gradient is reduced over devices.
        total = sums.merged()
        updates, after = transform.update(total, state.private, state.params)
        params = optax.apply_updates(state.params, updates)
        evaluated = evaluation_params(after.optimizer, params)
        average = _moving_average(state.average, evaluated, decay=decay, step=step)
        norm = optax.tree.norm(updates)
        released = Released(step, after.released, norm, total.l2_bound)
        state = state._replace(params=params, private=after, average=average)
        return layout.keep(state, params), released

    def place(chunk: Batch) -> Batch:
        return layout.place(chunk, config["compute"]["physical_batch_size"])

    return TrainStep(place, mechanism.phase, begin, accumulate, finish, frozen)


def init_state(
    config: Mapping[str, Any],
    experiment: Experiment,
    transform: Any,
) -> TrainState:
    """Return the state before the first step; its secrets are fresh unless seeded."""
    seed, layout = config["run"]["seed"], experiment.layout
    init_key = _key("init", seed)
    params = _placed_start(experiment, init_key, part=0)
    keeps_average = config["evaluation"]["ema_decay"] > 0
    state = TrainState(
        params=params,
        private=transform.init(params),
        average=jax.tree.map(_wide_copy, params) if keeps_average else (),
        loss_key=_key("loss", seed),
        init_key=init_key,
        sampling_seed=processes.of_first(
            jnp.asarray(np.frombuffer(entropy("sampling", seed=seed), np.uint32))
        ),
    )
    return layout.put(state, params)


def frozen_params(experiment: Experiment, state: TrainState) -> Params:
    """Return the parameters that are not trained; the same ones whenever a run goes on."""
    return _placed_start(experiment, state.init_key, part=1)


def sampling_seed(state: TrainState) -> int:
    """Return the 128-bit seed of the sampler. Secret."""
    return int.from_bytes(np.asarray(state.sampling_seed).tobytes(), "big")


def evaluated_params(state: TrainState, frozen: Params) -> Params:
    """Return what is evaluated and exported: all, the moving average if one is kept."""
    if jax.tree.leaves(state.average):
        trained = jax.tree.map(
            lambda mean, x: mean.astype(x.dtype), state.average, state.params
        )
    else:
        trained = evaluation_params(state.private.optimizer, state.params)
    return merge(trained, frozen)


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


def _record(ledger: Ledger, released: Released | None) -> None:
    if released is None:
        return
    step = int(released.step)
    if not math.isfinite(float(released.update_norm)):
        raise FloatingPointError(
            f"the update of step {step} is not finite: training diverged (lower the "
            "learning rate), or something changed the clipped sum before its release"
        )
    ledger.record(step, int(released.fingerprint))


def _moving_average(
    average: Params | tuple[()], params: Params, *, decay: float, step: Scalar
) -> Params | tuple[()]:
    if not jax.tree.leaves(average):
        return average
    # Short memory at first, so that the initial parameters are soon forgotten
    # (De et al. 2022, arXiv 2204.13650, appendix C).
    rate = jnp.minimum(decay, (1 + step) / (10 + step))
    return optax.incremental_update(params, average, 1 - rate)


def _wide_copy(leaf: jax.Array) -> jax.Array:
    # In bfloat16 a slow average would not move.
    return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32))


def _check_same_everywhere(identity: Mapping[str, Any]) -> None:
    """Refuse processes that were started with different configs, data or versions."""
    mine = json.dumps({**identity, "versions": report.versions()})
    for number, other in enumerate(processes.texts_of_all(mine)):
        keys = configs.differing_keys(json.loads(mine), json.loads(other), free=())
        if keys:
            raise configs.ConfigError(
                f"process {number} of this run differs in {', '.join(keys)} from process "
                f"{jax.process_index()}; start all with one command"
            )


def _open_ledger(workdir: Path, layout: Layout) -> Ledger:
    """Let the first process lock the ledger, and the others read it then."""
    path = workdir / "ledger.txt"
    is_first = processes.is_first()
    opened = Ledger(path, layout=str(layout)) if is_first else None
    processes.barrier("dpjax_ledger_opened")
    if opened is not None:
        return opened
    if not path.exists():
        raise configs.ConfigError(
            f"process {jax.process_index()} does not see {path}, which process 0 has "
            "opened: --workdir must be a directory that all processes share"
        )
    return Ledger(path, layout=str(layout), writes=False)


def _check_same_run(
    before: Mapping[str, Any] | None, now: Mapping[str, Any], workdir: Path
) -> None:
    if before is None:
        return
    keys = [k for k in configs.differing_keys(before, now) if k != "frozen"]
    if keys:
        raise configs.ConfigError(
            f"{workdir} holds a run that differs in {', '.join(keys)}; "
            "use another --workdir, or set these keys back"
        )


def _check_same_frozen(
    before: Mapping[str, Any] | None, now: Mapping[str, Any], workdir: Path
) -> None:
    if before is not None and before["frozen"] != now["frozen"]:
        raise configs.ConfigError(
            f"{workdir} holds a run on other frozen parameters than these: the weights "
            "that config.model reads have changed; bring back the old ones, or use "
            "another --workdir"
        )


def _placed_start(experiment: Experiment, key: Key, *, part: int) -> Params:
    """Return one part of the starting parameters, where the layout has them."""
    shapes = jax.eval_shape(lambda key: starts(experiment, key)[part], key)
    shardings = experiment.layout.of_params(shapes)
    start = jax.jit(lambda key: starts(experiment, key)[part], out_shardings=shardings)
    return start(key)


def _size(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _key(purpose: str, seed: int | None) -> Key:
    words = np.frombuffer(entropy(purpose, seed=seed), np.uint32)[:2]
    key = jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
    return processes.of_first(key)


class _Clock:
    """Throughput since the last report, in expected examples: real sizes are private."""

    def __init__(self, expected_batch_size: float, step: int) -> None:
        self._expected = expected_batch_size
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def examples_per_second(self, step: int) -> float:
        seconds = time.perf_counter() - self._time
        return (step - self._step) * self._expected / seconds
