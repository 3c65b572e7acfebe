"""Command line -> checked config, as plain dicts. Does not import jax."""

import functools
import operator
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from dpjax.config import ConfigError, check, nearest


def config_from(
    argv: list[str], *, directory: str = "workdir"
) -> tuple[dict[str, Any], Path]:
    """Return the checked config and the directory that ``argv`` asks for.

    Args:
        argv: ``--config=FILE``, overrides of its keys, and ``--DIRECTORY=DIR``.
        directory: What the option for the directory is called.

    Raises:
        ConfigError: In one line, whatever is wrong.
    """
    file = next((a for a in argv if a.startswith("--config=")), None)
    if file is None:
        raise ConfigError("--config=FILE is missing; see --help")
    path = Path(file.removeprefix("--config=").partition(":")[0])
    if not path.is_file():
        raise ConfigError(f"--config={path} is not a file")
    written, _ = _parse([file], directory)
    for argument in argv:
        _check_override(written, argument)
    # Overrides need the config to exist: --config goes first, wherever it stood.
    # Which keys may be None is for the checks: their types do not know it.
    unset = [a for a in argv if a.startswith("--config.") and a.endswith("=None")]
    rest = [a for a in argv if a not in (file, *unset)]
    config, chosen = _parse([file, *rest], directory)
    for argument in unset:
        *path, last = (
            argument.removeprefix("--config.").removesuffix("=None").split(".")
        )
        functools.reduce(operator.getitem, path, config)[last] = None
    check(config)
    if chosen is None and not config["run"]["dry_run"]:
        raise ConfigError(f"--{directory}=DIR is missing; see --help")
    return config, Path(chosen or ".")


def _parse(argv: list[str], directory: str) -> tuple[dict[str, Any], str | None]:
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string(directory, None, "", flag_values=values)
    # ml_collections looks for overrides in sys.argv itself.
    caller, sys.argv = sys.argv, ["train", *argv]
    try:
        unexpected = values(sys.argv)[1:]
    except Exception as error:  # A config file is the user's code: anything may come.
        raise ConfigError(_last_line(error)) from error
    finally:
        sys.argv = caller
    if unexpected:
        raise ConfigError(f"unexpected argument {unexpected[0]!r}; see --help")
    return holder.value.to_dict(), values[directory].value


def _check_override(config: dict[str, Any], argument: str) -> None:
    found = re.match(r"--(?:no)?config\.([^=]+)", argument)
    if not found:
        return
    node: Any = config
    for key in found[1].split("."):
        if not isinstance(node, Mapping) or key not in node:
            choices = node if isinstance(node, Mapping) else ()
            raise ConfigError(
                f"config.{found[1]} is unknown (keys are added in a config file, not "
                f"here); {nearest(key, choices)}"
            )
        node = node[key]


def _last_line(error: Exception) -> str:
    # ml_collections wraps the traceback of a config file in a flag error.
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
