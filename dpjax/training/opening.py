"""How a run is opened: checked, locked, and begun or gone on with where it was left."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpjax.parallel import processes
from dpjax.parallel.sharding import Layout
from dpjax.privacy.fingerprint import combined_fingerprint
from dpjax.privacy.noise import root_key
from dpjax.training import config as configs
from dpjax.training import memory, report, terminal
from dpjax.training.about import About, about, versions
from dpjax.training.checkpoint import Checkpoints
from dpjax.training.experiment import Experiment, build_experiment
from dpjax.training.ledger import Ledger
from dpjax.training.startup import check_parts
from dpjax.training.state import TrainState, frozen_params, init_state
from dpjax.training.verification.self_check import self_check
from dpjax.transforms import private
from dpjax.typing import Params


class Opened(NamedTuple):
    """A run that may go on. Secret, as its state is.

    Attributes:
        ledger: Of all releases; whoever has it open holds the workdir.
        saved: The checkpoints.
        identity: What must not change while the run goes on; goes with each checkpoint.
        about: What its card is about.
        transform: The mechanism, its noise and the optimizer as one; see ``private``.
        start: How many steps have been taken.
        state: The state after them.
        frozen: Parameters that are not trained.
    """

    ledger: Ledger
    saved: Checkpoints
    identity: Mapping[str, Any]
    about: About
    transform: Any  # optax types know trees of arrays only, not ClippedSum
    start: int
    state: TrainState
    frozen: Params

    def __repr__(self) -> str:
        return "Opened(secret: holds the state of a run)"


@contextlib.contextmanager
def opened(
    config: Mapping[str, Any], experiment: Experiment, workdir: Path
) -> Iterator[Opened]:
    """Open the run that ``workdir`` holds, or a new one, after all checks.

    Yields:
        The run; it is locked until the end of the context, and then all is saved.

    Raises:
        ConfigError: The config is wrong, or ``workdir`` holds a run of another one.
        SelfCheckError: ``run.self_check`` found a part that breaks the guarantee.
        CheckpointError: There are checkpoints, but none is usable.
        NoiseReuseError: The ledger does not go with the checkpoints.
    """
    shapes = check_parts(experiment)
    need = memory.checked(config, experiment, shapes)
    mechanism, run = experiment.mechanism, config["run"]
    identity = report.identity(config, mechanism, experiment.data_fingerprint)
    _check_same_everywhere(identity)
    if processes.is_first():
        _tell_operator(config, experiment)
    if run["self_check"]:
        passed = self_check(experiment)
        if processes.is_first():
            print(passed)
    noise_key = processes.of_first(root_key(run["seed"]))
    transform = private(mechanism, experiment.optimizer, noise_key=noise_key)
    with (
        _open_ledger(
            workdir, experiment.layout
        ) as ledger,  # first: it locks the workdir
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
            _check_new(ledger, workdir)
            if processes.is_first():
                text = report.config_text(config, mechanism)
                (workdir / "config.json").write_text(text)
            # Before any release, so that its keys cannot be lost and drawn anew.
            saved.save(0, state, metadata=identity, wait=True)
        if processes.is_first():
            print(_start_block(config, experiment, shapes, need))
        facts = about(
            config,
            shapes,
            data_fingerprint=experiment.data_fingerprint,
            secret=np.asarray(state.sampling_seed).tobytes(),
        )
        del fresh  # What was restored in its place is enough to hold.
        yield Opened(ledger, saved, identity, facts, transform, start, state, frozen)


def plan(config: Mapping[str, Any]) -> str:
    """Return the plan and the card of a run, without training.

    Raises:
        ConfigError: The config is wrong.
    """
    experiment = build_experiment(config)
    mechanism = experiment.mechanism
    shapes = check_parts(experiment)
    _tell_operator(config, experiment)
    need = memory.checked(config, experiment, shapes)
    if experiment.layout.devices > 1:
        need = memory.compiled(config, experiment, shapes)
    start = _start_block(config, experiment, shapes, need)
    found = experiment.inspection
    card = report.card_of(config, mechanism, mechanism.steps, inspection=found)
    if config["run"]["self_check"]:
        start = f"{self_check(experiment)}\n\n{start}"
    return (
        f"{start}\n\nIf all {mechanism.steps} steps are taken:\n\n{card.to_markdown()}"
    )


def _tell_operator(config: Mapping[str, Any], experiment: Experiment) -> None:
    found = report.inspected(experiment.inspection)
    terminal.tell(found, private=config["data"]["provenance"] == "private")


def _start_block(
    config: Mapping[str, Any],
    experiment: Experiment,
    shapes: tuple[Params, Params],
    need: memory.Need,
) -> str:
    trained, frozen = (
        sum(leaf.size for leaf in jax.tree.leaves(part)) for part in shapes
    )
    return report.start_block(
        config,
        experiment.mechanism,
        trained=trained,
        frozen=frozen,
        memory=memory.told(need, experiment.layout),
    )


def _check_same_everywhere(identity: Mapping[str, Any]) -> None:
    """Refuse processes that were started with different configs, data or versions."""
    mine = json.dumps({**identity, "versions": versions()})
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


def _check_new(ledger: Ledger, workdir: Path) -> None:
    """Refuse what another run has left where a new one is to begin."""
    ledger.check_empty()
    if (workdir / "export").exists():
        raise configs.ConfigError(f"{workdir} holds the export of another run")
