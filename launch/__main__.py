"""python -m launch SCHEDULER --name=NAME [--option=value ...] [--dry_run] -- COMMAND...

SCHEDULER   local, slurm, jobset, sky or tpu
--dry_run   print exactly what would run, start nothing
--env=K=V   set a variable; may be given again
--help      after a scheduler: its options

Exit status: 0 done or submitted, 2 the job cannot be started; of local, the job's own.
"""

import dataclasses
import sys
import types
from typing import Any, get_args, get_type_hints

from dpjax.training.config import nearest
from launch import jobset, local, sky, slurm, tpu
from launch.job import Job, LaunchError

SCHEDULERS: dict[str, types.ModuleType] = {
    "local": local,
    "slurm": slurm,
    "jobset": jobset,
    "sky": sky,
    "tpu": tpu,
}


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(__doc__)
            return 0
        scheduler, given = argv[0], argv[1:]
        if scheduler not in SCHEDULERS:
            raise LaunchError(
                f"scheduler={scheduler!r} is unknown; {nearest(scheduler, SCHEDULERS)}"
            )
        module = SCHEDULERS[scheduler]
        if {"-h", "--help"} & set(given[: _separator(given)]):
            print(Job.__doc__, module.Options.__doc__, sep="\n")
            return 0
        job, options, dry_run = parse(module.Options, given)
        return _launch(module, job, options, dry_run=dry_run)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _launch(module: Any, job: Job, options: Any, *, dry_run: bool) -> int:
    if module is local:
        if not dry_run:
            return local.run(job, options)
        print(local.show(job, options), end="")
    else:
        call = module.render(job, options)
        if dry_run:
            print(call, end="")
        else:
            call.run(output="shown")
    return 0


def parse(options: type, argv: list[str]) -> tuple[Job, Any, bool]:
    """Return the job, the scheduler's options, and whether only to show what would run.

    Raises:
        LaunchError: Something is unknown, missing or wrong.
    """
    end = _separator(argv)
    known = {
        field.name: kind
        for kind in (Job, options)
        for field in dataclasses.fields(kind)
        if field.name not in ("command", "environment")
    }
    values: dict[type, dict[str, Any]] = {
        Job: {"command": tuple(argv[end + 1 :]), "environment": {}},
        options: {},
    }
    for argument in argv[:end]:
        if argument == "--dry_run":
            continue
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in (*known, "env"):
            raise LaunchError(
                f"{argument} is unknown; {nearest(name, [*known, 'env', 'dry_run'])}"
            )
        if not equals:
            raise LaunchError(f"--{name} has no value; use --{name}=...")
        if "\n" in value:
            raise LaunchError(f"--{name}={value!r} must be one line")
        if name == "env":
            key, equals, content = value.partition("=")
            if not equals:
                raise LaunchError(f"--env={value} has no value; use --env=NAME=VALUE")
            values[Job]["environment"][key] = content
        else:
            values[known[name]][name] = _converted(known[name], name, value)
    dry_run = "--dry_run" in argv[:end]
    return _made(Job, values[Job]), _made(options, values[options]), dry_run


def _separator(argv: list[str]) -> int:
    return argv.index("--") if "--" in argv else len(argv)


def _converted(kind: type, name: str, value: str) -> str | int:
    hint = get_type_hints(kind)[name]
    if int not in (hint, *get_args(hint)):
        return value
    try:
        return int(value)
    except ValueError:
        raise LaunchError(f"{name}={value!r} must be a whole number") from None


def _made(kind: type, values: dict[str, Any]) -> Any:
    for field in dataclasses.fields(kind):
        required = (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        )
        if required and field.name not in values:
            raise LaunchError(f"--{field.name}=... is missing; see --help")
    return kind(**values)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
