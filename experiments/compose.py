"""State what several runs on the same data cost together: one card for all of them.

    python -m experiments.compose WORKDIR WORKDIR... --out=FILE.md

WORKDIR        of experiments.train, one for each run; a run goes in at the steps it has taken
--out=FILE.md  receives the card

For a run that starts from the export of another one (dpjax.models.weights:exported), to take
more steps than were planned for instance: name both. For a search over many, that is
`python -m experiments.gather`.

Exit status: 0 done, 2 wrong arguments or input.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpjax.training.config import PRIVATE_START, WEIGHTS, ConfigError, flatten
from dpjax.training.ledger import Ledger, NoiseReuseError
from experiments.shared import options, report
from experiments.sweeps import summary, sweep


class Run(NamedTuple):
    """What a run left; ``steps`` counts what its ledger has, which the card may lack."""

    workdir: Path
    config: Mapping[str, Any]
    card: Mapping[str, Any]
    steps: int


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    return options.command(argv, __doc__, _composed)


def _composed(argv: list[str]) -> int:
    workdirs, out = _parse(argv)
    text = composed([_read(workdir) for workdir in workdirs])
    out.write_text(text)
    print(text.partition("\n")[0].removeprefix("# "))
    print(out)
    return 0


def composed(runs: Sequence[Run]) -> str:
    """Return the card of all runs, as a page.

    Raises:
        ValueError: A run is without privacy, or they have no common epsilon.
    """
    from dpjax.privacy.accounting import tuning_cost

    for run in runs:
        if not summary.protects(run.config):
            raise ConfigError(f"{run.workdir} is a run without privacy")
    steps = [run.steps for run in runs]
    cost = tuning_cost([summary.mechanism(r.config) for r in runs], steps=steps)
    claim = f"epsilon = {cost.composed:.4g} at delta = {cost.delta:g}"
    if not all(run.card["private"] for run in runs):
        claim = "NOT PRIVATE"
    elif cost.claimed:
        claim += " (claimed, assumption-based)"
    flags = [f"{r.workdir}: {flag}" for r in runs for flag in _flags(r, runs)]
    table = report.markdown(
        ("run", "mechanism", "steps accounted / planned"),
        [
            (
                str(r.workdir),
                r.card["mechanism"]["name"],
                f"{r.steps} / {r.card['steps_planned']}",
            )
            for r in runs
        ],
    )
    assumed = dict.fromkeys(a for r in runs for a in r.card["assumptions"])
    assumptions = [
        a.replace("covers this run only", "covers these only") for a in assumed
    ]
    return "\n".join(
        [
            f"# Privacy card of {len(runs)} runs together: {claim}",
            "",
            "All that these runs released, for one example that is in the data of all.",
            "",
            table,
            "## Flags",
            "",
            *(f"- {flag}" for flag in flags or ["none"]),
            "",
            "## Assumptions",
            "",
            *(f"- {assumption}" for assumption in assumptions),
            "",
        ]
    )


def _flags(run: Run, runs: Sequence[Run]) -> list[str]:
    """Return the flags of a card, without that of a start that is accounted here."""
    starts = _starts(run.config)
    accounted = {other.workdir.resolve() for other in runs}
    known = bool(starts) and all(accounted & {*path.parents} for path in starts)
    return [
        flag
        for flag in run.card["flags"]
        if not (known and flag.startswith(PRIVATE_START))
    ]


def _starts(config: Mapping[str, Any]) -> list[Path]:
    """Return the files from which the parameters start."""
    model = flatten({"model": config["model"]})
    return [
        Path(model[f"{key.removesuffix('name')}path"]).resolve()
        for key, value in model.items()
        if key.endswith("name") and str(value).startswith(WEIGHTS)
    ]


def _read(workdir: Path) -> Run:
    names = ("config.json", "privacy_card.json", "ledger.txt")
    files = [workdir / name for name in names]
    for file in files:
        if not file.is_file():
            raise ConfigError(
                f"{workdir} has no {file.name}: no run of experiments.train that has taken "
                "a step"
            )
    config, card = map(sweep.read_json, files[:2])
    try:
        released = Ledger(workdir / "ledger.txt", layout="", writes=False).releases
    except NoiseReuseError as error:
        raise ConfigError(str(error)) from error
    return Run(workdir, config, card, max(card["steps_taken"], released))


def _parse(argv: list[str]) -> tuple[list[Path], Path]:
    workdirs, given = options.split(argv, ("out",))
    if len({Path(w).resolve() for w in workdirs}) < max(2, len(workdirs)):
        raise ConfigError("name the workdirs of two runs or more; see --help")
    out = options.file("out", given.get("out"), ".md")
    return [Path(workdir) for workdir in workdirs], out


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
