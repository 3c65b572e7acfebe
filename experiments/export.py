"""Export the parameters of a checkpoint, with the card of what its run has released.

    python -m experiments.export WORKDIR --out=DIR [--step=N]

WORKDIR    of experiments.train: a run that was ended before its plan, for instance
--out=DIR  receives params.npz, parameters.json and privacy_card.{json,md}; must not exist
--step=N   the checkpoint of step N, the newest if not given

The data and files that the config names must be as they were. The card is at all steps that
the run has released, also those after the checkpoint: which one is exported may have been
chosen by what came later. The run itself may go on afterwards, to the end of its plan. To
take more steps than were planned, start a new run from the export, and state what both cost
together by `python -m experiments.compose`.

Exit status: 0 done, 2 wrong arguments or input, 1 the checkpoint or the ledger is unusable.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dpjax.training.config import ConfigError, differing_keys
from experiments.shared import options
from experiments.sweeps import sweep


class Plan(NamedTuple):
    """What was asked for, checked."""

    workdir: Path
    out: Path
    step: int | None


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    return options.command(argv, __doc__, lambda argv: _export(_plan(argv)))


def resolved_config(workdir: Path) -> dict[str, Any]:
    """Return the config of a run without what was resolved, on one device.

    Raises:
        ConfigError: There was no run.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise ConfigError(f"{workdir} has no config.json: no run of experiments.train")
    config = sweep.read_json(path)
    del config["resolved"]
    config["mesh"] |= {"data": 1, "fsdp": 1, "model": 1}
    return config


def _export(plan: Plan) -> int:
    config = resolved_config(plan.workdir)
    if not (plan.workdir / "checkpoints").is_dir():
        raise ConfigError(f"{plan.workdir} has no checkpoints")
    options.keep_programs()
    import jax

    from dpjax.privacy.fingerprint import combined_fingerprint
    from dpjax.privacy.noise import root_key
    from dpjax.training import report
    from dpjax.training.about import About, file_digest
    from dpjax.training.checkpoint import CheckpointError, Checkpoints
    from dpjax.training.experiment import build_experiment
    from dpjax.training.export import export
    from dpjax.training.ledger import Ledger, NoiseReuseError
    from dpjax.training.state import evaluated_params, frozen_params, init_state
    from dpjax.transforms import private

    experiment = build_experiment(config)
    mechanism = experiment.mechanism
    transform = private(mechanism, experiment.optimizer, noise_key=root_key(None))
    try:
        with (  # the ledger first: it locks the workdir
            Ledger(
                plan.workdir / "ledger.txt", layout=str(experiment.layout)
            ) as ledger,
            Checkpoints(plan.workdir / "checkpoints", keep=1) as saved,
        ):
            like = init_state(config, experiment, transform)
            restored = saved.restore(like, step=plan.step)
            before = saved.metadata()
            if restored is None or before is None:
                raise ConfigError(f"{plan.workdir} has no checkpoints")
            step, state = restored
            ledger.check_complete(step)
            releases = ledger.releases
    except (CheckpointError, NoiseReuseError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if releases == 0:
        raise ConfigError(f"{plan.workdir} has released nothing: it took no step")
    frozen = frozen_params(experiment, state)
    now = report.identity(config, mechanism, experiment.data_fingerprint)
    now["frozen"] = int(jax.jit(combined_fingerprint)(frozen))
    differing = differing_keys(before, now)
    if differing:
        raise ConfigError(
            f"{plan.workdir} holds a run that differs in {', '.join(differing)}: bring back "
            "the data and files that it was started with"
        )
    card = report.card_of(config, mechanism, releases, inspection=experiment.inspection)
    names = report.parameter_names(state.params, frozen)
    export(plan.out, evaluated_params(state, frozen), card.files() | names)
    written = plan.workdir / "privacy_card.json"
    if written.is_file():  # else the run was ended before its first evaluation or save
        # Of the run: this may be another machine, and another commit.
        facts = About(**sweep.read_json(written)["about"])
        facts = replace(facts, parameters=file_digest(plan.out / "params.npz"))
        replace(card, about=facts).write(plan.out)
    print(f"step {step} of {mechanism.steps}, {releases} released: {card.headline()}")
    print(plan.out)
    return 0


def _plan(argv: list[str]) -> Plan:
    workdirs, given = options.split(argv, ("out", "step"))
    if len(workdirs) != 1:
        raise ConfigError("name one workdir; see --help")
    workdir = Path(workdirs[0])
    if "out" not in given:
        raise ConfigError("--out=DIR is missing; see --help")
    out = Path(given["out"])
    if out.exists():
        raise ConfigError(f"--out={out} exists; export to a new folder")
    if out.absolute() == (workdir / "export").absolute():
        raise ConfigError(f"--out={out} is for the end of the run; name another folder")
    step = options.natural("step", given["step"]) if "step" in given else None
    return Plan(workdir, out, step)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
