"""Options ``--name=value`` of the benchmarks. Imports no framework."""

from collections.abc import Iterable
from pathlib import Path

from dpjax.config import nearest


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


def positive(option: str, value: str) -> int:
    """Return the number that the option asks for.

    Raises:
        ValueError: It is not a positive integer.
    """
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"--{option}={value} must be an integer of at least 1")
    return int(value)


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
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--{option}={value} is in a directory that is absent")
    return path
