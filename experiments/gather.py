"""Gather a sweep: its table, what failed or is missing, its plot and what it cost.

    python -m experiments.gather DIR [--out=FILE.json] [--with=DIR,...] [--resubmit]
        [--workers=N --launcher=local|slurm ...] [--choose=LABEL,...] [--chosen=FILE.json]
        [--plot=FILE.png --x=LABEL --lines=LABEL [--panels=LABEL]]

DIR                the folder of a sweep that experiments.ablate wrote
--out=FILE.json    receives rows and cost
--with=DIR,...     further sweeps on the same data: their runs count in the cost
--resubmit         run what failed or is missing, and that only, before anything else
--workers=N, ...   for that, and the other options of experiments.ablate
--choose=LABEL,... keep, of rows that differ in these labels only, the best
--chosen=FILE.json receives these choices: what a sweep of other seeds reads
--plot=FILE.png    scores against --x, a line for each value of --lines, a panel for each
                   value of --panels

Scores are means over seeds, with the half-width of a 95% confidence interval (Student's t).
Every run that began counts in the cost, at its planned steps: failed ones, and runs that the
sweep no longer lists. Runs on data declared public cost nothing. What the cost leaves out,
such as written seeds, is said below it.

Exit status: 0 all runs are finished, 1 some failed or are missing, 2 wrong arguments.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from dpjax.training.config import ConfigError
from experiments import ablate
from experiments.shared import options, timing
from experiments.sweeps import summary, sweep

_RUNNING = ("workers", "launcher", "accelerator", "minutes", "sbatch")
_OPTIONS = (
    "out",
    "with",
    *_RUNNING,
    "choose",
    "chosen",
    "plot",
    "x",
    "lines",
    "panels",
)


class Plan(NamedTuple):
    """What was asked for, checked."""

    directory: Path
    others: tuple[Path, ...]
    resubmit: bool
    given: dict[str, str]


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    return options.command(argv, __doc__, _gather)


def _gather(argv: list[str]) -> int:
    plan = _plan(argv)
    if plan.resubmit:
        _resubmit(plan)
    return _report(plan, argv)


def _report(plan: Plan, argv: list[str]) -> int:
    manifest = sweep.read_manifest(plan.directory)
    results = summary.results(manifest, plan.directory)
    rows = summary.rows(results)
    choices: list[dict[str, Any]] = []
    if "choose" in plan.given:
        tuned = plan.given["choose"].split(",")
        rows, choices = summary.choose(rows, tuned, best=manifest["best"])
    print(summary.table(rows))
    unfinished = [r for r in results if r["status"] != "finished"]
    for result in unfinished:
        why = f": {result['error']}" if result["error"] else ""
        print(f"cell {result['index']} {result['status']}{why}")
    for choice in choices:
        if choice["edges"]:
            print(f"at the edge of its grid, {choice['edges']}: {choice['labels']}")
    directories = [plan.directory, *plan.others]
    caveats = summary.caveats(directories)
    try:
        cost = summary.cost(directories)
        print(summary.cost_text(cost, caveats))
    except ValueError as error:  # What was found is worth having all the same.
        cost = None
        caveats.append(f"the sweep has no cost: {error}")
        print("\n" + "\n".join(f"  ! {caveat}" for caveat in caveats))
    if "chosen" in plan.given:
        sweep.write_json(Path(plan.given["chosen"]), {"choices": choices})
    if "plot" in plan.given:
        figure = summary.draw(
            rows,
            x=plan.given["x"],
            lines=plan.given["lines"],
            panels=plan.given.get("panels"),
        )
        figure.savefig(plan.given["plot"], dpi=110)
        print(plan.given["plot"])
    if "out" in plan.given:
        facts = timing.provenance(
            module="experiments.gather", argv=argv, packages=("dpjax",), device=""
        )
        kept = {name: facts[name] for name in ("command", "date", "git")}
        found = {**kept, "sweep": manifest["sweep"], **summary.provenance(results)}
        found |= {"rows": rows, "cost": summary.cost_facts(cost), "caveats": caveats}
        found["unfinished"] = len(unfinished)
        sweep.write_json(Path(plan.given["out"]), found)
        print(plan.given["out"])
    return 1 if unfinished else 0


def _resubmit(plan: Plan) -> None:
    manifest = sweep.read_manifest(plan.directory)
    how = [f"--{name}={plan.given[name]}" for name in _RUNNING if name in plan.given]
    if ablate.main([manifest["sweep"], f"--out={plan.directory}", *how]) == 2:
        raise ConfigError(f"{manifest['sweep']} could not be run again")


def _plan(argv: list[str]) -> Plan:
    flags = [a for a in argv if a != "--resubmit"]
    directories, given = options.split(flags, _OPTIONS)
    if len(directories) != 1:
        raise ConfigError("name one folder of a sweep; see --help")
    others = tuple(Path(name) for name in given.get("with", "").split(",") if name)
    for directory in (Path(directories[0]), *others):
        if not (directory / sweep.MANIFEST).is_file():
            raise ConfigError(
                f"{directory} has no {sweep.MANIFEST}: no sweep ran there"
            )
    for option, suffix in (("out", ".json"), ("chosen", ".json"), ("plot", ".png")):
        if option in given:
            options.file(option, given[option], suffix)
    if "--resubmit" not in argv and (stray := set(_RUNNING) & set(given)):
        raise ConfigError(f"--{stray.pop()} is for --resubmit")
    _check_labels(Path(directories[0]), given)
    return Plan(Path(directories[0]), others, "--resubmit" in argv, given)


def _check_labels(directory: Path, given: dict[str, str]) -> None:
    if ("chosen" in given) and ("choose" not in given):
        raise ConfigError("--chosen needs --choose=LABEL")
    if "plot" in given and not {"x", "lines"} <= given.keys():
        raise ConfigError("--plot needs --x=LABEL and --lines=LABEL")
    cells = sweep.read_manifest(directory)["cells"]
    labels = list(dict.fromkeys(name for cell in cells for name in cell["labels"]))
    for option in ("choose", "x", "lines", "panels"):
        if option in given:
            options.choices(option, given[option], labels)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
