"""Attack what a config claims: is the epsilon on its privacy card true?

    python -m experiments.audit --config=configs/digits_mlp_dpsgd.py[:variant] --out=DIR
        [--attack=A,B] [--trials=N] [--canaries=N] [--scores=IN.txt,OUT.txt]
        [--confidence=0.99] [--seed=N] [--config.group.key=value ...]

--config=FILE[:VARIANT]  a config file; see configs/
--out=DIR                receives audit.json, audit.md and audit.png
--attack=A,B             likelihood, opposed, reuse: simulations of the mechanism on
                         worst-case neighbours (dpjax.audit.distinguish); all that apply if
                         not given
                         dirac, random, per_layer, input: one real run (of DpSgd, steps and
                         engine as configured) with canaries (dpjax.audit.canaries)
--trials=N               simulated runs on each neighbour; 20000 if not given
--canaries=N             of the run with canaries; 600 if not given. Too few to refute the
                         claim are refused
--scores=IN.txt,OUT.txt  instead of --attack: scores of an attack of your own on independent
                         runs with the target, and on as many without it; one number a
                         line, unsorted, the higher, the more "in"
--confidence=0.99        of all findings together
--seed=N                 of the simulation and of the canaries; 0 if not given

A run with canaries reads the private data and costs privacy as any run does; its report
carries the noise of the releases. "consistent" is no proof: it says that these attacks did
not refute the claim.

Exit status: 0 consistent, 1 VIOLATED, 2 wrong config or input.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from dpjax.training.config import ConfigError
from experiments.shared import options
from experiments.shared.config_flags import command_from

SIMULATIONS = ("likelihood", "opposed", "reuse")
CANARIES = ("dirac", "random", "per_layer", "input")
_OPTIONS = ("attack", "trials", "canaries", "scores", "confidence", "seed")


class Plan(NamedTuple):
    """What was asked for, checked."""

    config: dict[str, Any]
    attacks: list[str] | None
    trials: int
    canaries: int
    scores: list[Path]
    confidence: float
    seed: int
    out: Path


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    return options.command(argv, __doc__, lambda argv: _run(_plan(argv)))


def _plan(argv: list[str]) -> Plan:
    """Check what can be checked before anything is computed."""
    own = [a for a in argv if not a.startswith(("--config.", "--config=", "--out="))]
    given = options.read(own, _OPTIONS)
    attacks = given.get("attack")
    return Plan(
        attacks=None
        if attacks is None
        else options.choices("attack", attacks, (*SIMULATIONS, *CANARIES)),
        trials=options.positive("trials", given.get("trials", "20000")),
        canaries=options.positive("canaries", given.get("canaries", "600")),
        scores=_scores(given),
        confidence=options.fraction("confidence", given.get("confidence", "0.99")),
        seed=options.natural("seed", given.get("seed", "0")),
        **_config([a for a in argv if a not in own]),
    )


def _scores(given: dict[str, str]) -> list[Path]:
    if "scores" not in given:
        return []
    if clash := {"attack", "trials", "canaries"} & given.keys():
        raise ValueError(
            f"--scores are of an attack of your own: leave out --{clash.pop()}"
        )
    files = [Path(name) for name in given["scores"].split(",")]
    if len(files) != 2:
        raise ValueError(f"--scores={given['scores']} must name two files")
    return files


def _config(argv: list[str]) -> dict[str, Any]:
    config, out, peers = command_from(argv, directory="out")
    if peers is not None:
        raise ConfigError("an audit runs in one process: leave out what names others")
    if config["run"]["dry_run"]:
        raise ConfigError(
            "config.run.dry_run=True: an audit makes nothing but a report"
        )
    return {"config": config, "out": out}


def _run(plan: Plan) -> int:
    options.keep_programs()
    from dpjax.audit import verdict
    from dpjax.training import report
    from dpjax.training.experiment import build_experiment
    from experiments.audits import report as audit_report

    experiment = build_experiment(plan.config)
    mechanism = experiment.mechanism
    card = report.card_of(plan.config, mechanism, mechanism.steps)
    if not card.private:
        raise ConfigError(
            f"the privacy card of this config is NOT PRIVATE ({card.flags[0]}): "
            "there is no claim to audit"
        )
    findings = _findings(plan, experiment)
    audit_report.write(card, findings, plan.out)
    audit_report.print_summary(card, findings, plan.out)
    return int(verdict.worst(findings) == "VIOLATED")


def _findings(plan: Plan, experiment: Any) -> list[Any]:
    from dpjax.audit import canaries, distinguish, verdict

    mechanism = experiment.mechanism
    if plan.scores:
        inside, outside = map(_numbers, plan.scores)
        claim = verdict.claim_of(mechanism)
        judged = verdict.judge(
            inside, outside, claim, attack="scores", confidence=plan.confidence
        )
        return [judged]
    chosen = plan.attacks or list(distinguish.attacks_on(mechanism))
    simulated = [a for a in chosen if a in SIMULATIONS]
    # Each attack has the same share of the error.
    error = (1 - plan.confidence) / len(chosen)
    if set(chosen) & set(CANARIES):
        claim = verdict.claim_of(mechanism)
        # Before the run: it costs privacy, and a check that cannot fail is none.
        verdict.check_canaries(plan.canaries, claim, confidence=1 - error)
    findings = []
    if simulated:
        findings = verdict.audit_mechanism(
            mechanism,
            trials=plan.trials,
            seed=plan.seed,
            confidence=1 - error * len(simulated),
            attacks=simulated,
        )
    for kind in chosen:
        if kind in CANARIES:
            scores = canaries.canary_scores(
                plan.config, experiment, kind=kind, count=plan.canaries, seed=plan.seed
            )
            claim = verdict.claim_of(mechanism)
            findings.append(
                verdict.judge_one_run(*scores, claim, attack=kind, confidence=1 - error)
            )
    return findings


def _numbers(file: Path) -> list[float]:
    """Return the numbers of a file, one a line."""
    try:
        return [float(line) for line in file.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(
            f"--scores: {file} must have one number a line: {error}"
        ) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
