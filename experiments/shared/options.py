"""What every command begins with: help, options ``--name=value``, errors of one line.

Imports no framework.
"""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dpjax.training.config import nearest


def command(
    argv: list[str],
    usage: str | None,
    parse: Callable[[list[str]], Any],
    run: Callable[[Any], int] = int,
) -> int:
    """Run a command; return its exit status: 2 where its input is wrong.

    Args:
        argv: Its arguments.
        usage: What ``--help`` prints.
        parse: Whose ValueError, OSError or ImportError is told in one line.
        run: Takes what ``parse`` returned; its errors are not the user's.
    """
    if {"-h", "--help"} & set(argv):
        print(usage)
        return 0
    try:
        asked = parse(argv)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run(asked)


def keep_programs() -> None:
    """Keep compiled programs between runs; call it before JAX is imported.

    No secret is in them: secrets are arguments, never constants.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(".cache") / "jax"))


def split(argv: list[str], known: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Return what is no option, and the options that were given (see ``read``)."""
    names = [argument for argument in argv if not argument.startswith("-")]
    return names, read([a for a in argv if a.startswith("-")], known)


def read(argv: list[str], known: Iterable[str]) -> dict[str, str]:
    """Return the options that were given.

    Raises:
        ValueError: One is not known, or has no value.
    """
    options = {}
    for argument in argv:
        name, _, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in known:
            raise ValueError(f"{argument} is unknown; {nearest(name, known)}")
        if not value:
            raise ValueError(f"--{name} has no value; use --{name}=...")
        options[name] = value
    return options


def choices(option: str, value: str | None, known: Iterable[str]) -> list[str]:
    """Return the names in ``value``, or all if it is None.

    Raises:
        ValueError: One is not known.
    """
    known = list(known)
    names = known if value is None else value.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"--{option}={name} is unknown; {nearest(name, known)}")
    return list(dict.fromkeys(names))


def file(option: str, value: str | None, suffix: str) -> Path:
    """Return the path of a file to write.

    Raises:
        ValueError: It is missing, of another kind, or in no directory.
    """
    if value is None:
        raise ValueError(f"--{option}=FILE{suffix} is missing; see --help")
    path = Path(value)
    if path.suffix != suffix:
        raise ValueError(f"--{option}={value} must end with {suffix}")
    if path.is_dir():
        raise ValueError(f"--{option}={value} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--{option}={value} is in a directory that is absent")
    return path


def positive(option: str, value: str) -> int:
    """Return an integer of at least 1.

    Raises:
        ValueError: It is none.
    """
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"--{option}={value} must be an integer of at least 1")
    return int(value)


def natural(option: str, value: str) -> int:
    """Return an integer of at least 0.

    Raises:
        ValueError: It is none.
    """
    if not value.isdecimal():
        raise ValueError(f"--{option}={value} must be an integer of at least 0")
    return int(value)


def fraction(option: str, value: str) -> float:
    """Return a number strictly between 0 and 1.

    Raises:
        ValueError: It is none.
    """
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < 1:
        raise ValueError(f"--{option}={value} must be strictly between 0 and 1")
    return number
