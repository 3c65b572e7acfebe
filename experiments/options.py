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
