"""The only training loop. Read it from top to bottom: it is the whole system."""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpjax.data.batches import batches
from dpjax.parallel import processes
from dpjax.privacy.accounting import epsilon
from dpjax.training import report
from dpjax.training.ending import publish
from dpjax.training.evaluate import evaluator
from dpjax.training.experiment import build_experiment, learning_rate
from dpjax.training.export import take_part
from dpjax.training.metrics import Progress, writers
from dpjax.training.opening import opened
from dpjax.training.recording import Clock, pause_after, record, summarise
from dpjax.training.state import TrainState, evaluated_params, sampling_seed
from dpjax.training.step import make_train_step
from dpjax.training.verification.verify import verify


class Interrupted(Exception):
    """SIGTERM or SIGINT came; the state was saved first."""


def train(config: Mapping[str, Any], workdir: Path) -> TrainState:
    """Train as ``config`` says, or go on with the run that ``workdir`` holds.

    Args:
        config: Plain dicts; see ``dpjax.training.config``.
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
    mechanism, layout, run = experiment.mechanism, experiment.layout, config["run"]
    size = config["compute"]["physical_batch_size"]
    metric, score = report.metric_name(config), math.nan
    silent = not processes.is_first()  # Only one of several processes tells and writes.
    with opened(config, experiment, workdir) as run_here:
        ledger, saved, start = run_here.ledger, run_here.saved, run_here.start
        state, frozen = run_here.state, run_here.frozen
        train_step = make_train_step(config, experiment, run_here.transform, frozen)
        rate = learning_rate(config["optimizer"])
        if run["verify"] and mechanism.private and start < mechanism.steps:
            verify(experiment, train_step, state, physical_batch_size=size)

        def card_at(releases: int) -> report.PrivacyCard:
            facts, found = run_here.about, experiment.inspection
            return report.card_of(config, mechanism, releases, facts, found)

        at_once = config["evaluation"]["batch_size"]
        evaluate = evaluator(experiment.metric, batch_size=at_once, layout=layout)
        stream = batches(
            experiment.source,
            mechanism,
            seed=sampling_seed(state),
            physical_batch_size=size,
            start=start,
            rows=layout.rows(size),
        )
        with (
            contextlib.closing(stream),
            writers(
                run["writers"], workdir, resume_step=start, silent=silent
            ) as writer,
            Progress(mechanism.steps, start=start, silent=silent) as progress,
            processes.interruptions() as interrupted,
        ):
            clock = Clock(mechanism.expected_batch_size, start)
            unrecorded, accounted = None, 0
            for batch in stream:  # Who was drawn, in chunks of one shape.
                # Clipped, released with noise, and the parameters updated with that.
                state, released, statistics = train_step(state, batch)
                # The device works on this step while the host records the one before.
                if unrecorded is not None:
                    record(ledger, unrecorded)
                unrecorded, step = released, batch.step + 1
                stop = interrupted(step)
                pause = pause_after(step, run, last=mechanism.steps, stop=stop)
                if pause is None:
                    continue

                # Nothing that depends on a release is written before the ledger and the
                # card tell of it.
                record(ledger, released)
                unrecorded = None
                # The accountant takes its time, which is none of the steps'.
                speed = {"examples/s": clock.examples_per_second(step)}
                if accounted != pause.accounted:
                    accounted = pause.accounted
                    if not silent:
                        card_at(max(accounted, ledger.releases)).write(workdir)
                scalars = {"epsilon": epsilon(mechanism, steps=accounted)}
                scalars["update_norm"] = float(released.update_norm)
                if mechanism.private:
                    scalars["clip_norm"] = float(released.clip_norm)
                if run["log_sensitive"]:
                    found = mechanism.diagnose(state.private.mechanism)
                    scalars |= summarise(statistics, found | speed)
                if pause.score:
                    params = evaluated_params(state, frozen)
                    score = scalars[metric] = evaluate(params, experiment.held_out)
                writer.write(step, scalars)
                shown = {} if rate is None else {"lr": rate(batch.step)}
                # Not to the writers: it depends on the sizes of the batches.
                progress.update(step, speed | scalars | shown)
                if pause.save:
                    ledger.sync()
                    saved.save(step, state, metadata=run_here.identity)
                if stop and step < mechanism.steps:
                    saved.wait()
                    raise Interrupted(f"saved step {step} of {mechanism.steps}")
                clock.restart(step)

        params = evaluated_params(state, frozen)
        if math.isnan(score):  # The run was complete before it was resumed.
            score = evaluate(params, experiment.held_out)
        if silent:
            take_part(params)
        else:
            names = report.parameter_names(state.params, frozen)
            publish(workdir, params, card_at(mechanism.steps), names, {metric: score})
    return state
