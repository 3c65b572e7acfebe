"""Command line -> checked config, as plain dicts. Does not import jax."""

import functools
import operator
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from dpjax.training.config import ConfigError, check, nearest, place_of

PEERS = ("coordinator_address", "num_processes", "process_id")


class Command(NamedTuple):
    """What a command line asks for.

    Attributes:
        config: Checked.
        workdir: Of the run.
        peers: Keywords of ``dpjax.parallel.processes.joined``; None for a run of one process.
    """

    config: dict[str, Any]
    workdir: Path
    peers: dict[str, Any] | None


def command_from(argv: list[str], *, directory: str = "workdir") -> Command:
    """Return the checked config, the workdir and the peers that ``argv`` asks for.

    Args:
        argv: ``--config=FILE``, overrides of its keys, ``--DIRECTORY=DIR``, and peers.
        directory: What the option for the workdir is called.

    Raises:
        ConfigError: In one line, whatever is wrong.
    """
    file = next((a for a in argv if a.startswith("--config=")), None)
    if file is None and "--config" in argv:
        raise ConfigError("--config FILE is written --config=FILE")
    if file is None:
        raise ConfigError("--config=FILE is missing; see --help")
    if len([a for a in argv if a.startswith("--config=")]) > 1:
        raise ConfigError("--config=FILE is given twice; a run has one config")
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
    config, given = _parse([file, *rest], directory)
    for argument in unset:
        *path, last = (
            argument.removeprefix("--config.").removesuffix("=None").split(".")
        )
        functools.reduce(operator.getitem, path, config)[last] = None
    check(config)
    if not given[directory] and not config["run"]["dry_run"]:
        raise ConfigError(f"--{directory}=DIR is missing; see --help")
    workdir = Path(given[directory] or ".")
    if taken := next((p for p in (workdir, *workdir.parents) if p.is_file()), None):
        raise ConfigError(f"--{directory}={workdir}: {taken} is a file, and no folder")
    return Command(config, workdir, _peers(given))


def _parse(argv: list[str], directory: str) -> tuple[dict[str, Any], dict[str, Any]]:
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    for name in (directory, "distributed", "coordinator_address"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    for name in ("num_processes", "process_id"):
        flags.DEFINE_integer(name, None, "", flag_values=values)
    # ml_collections looks for overrides in sys.argv itself.
    caller, sys.argv = sys.argv, ["train", *argv]
    try:
        unexpected = values(sys.argv)[1:]
    # A config file is the user's code: anything may come.
    except (Exception, SystemExit) as error:
        raise ConfigError(_told(error)) from error
    finally:
        sys.argv = caller
    if unexpected:
        raise ConfigError(f"unexpected argument {unexpected[0]!r}; see --help")
    given = {name: values[name].value for name in (directory, "distributed", *PEERS)}
    if not isinstance(holder.value, ConfigDict):
        kind = type(holder.value).__name__
        raise ConfigError(f"get_config() returned a {kind}; it must be a ConfigDict")
    return holder.value.to_dict(), given


def _peers(given: Mapping[str, Any]) -> dict[str, Any] | None:
    peers = {name: given[name] for name in PEERS}
    missing = [name for name in PEERS if peers[name] is None]
    if given["distributed"] is not None:
        if given["distributed"] != "auto" or len(missing) < len(PEERS):
            raise ConfigError(
                f"--distributed={given['distributed']} must be 'auto', and alone: it asks "
                "the scheduler for what --coordinator_address, --num_processes and "
                "--process_id say"
            )
        return {}
    if len(missing) == len(PEERS):
        return None
    if missing:
        raise ConfigError(f"--{missing[0]} is missing; {', '.join(PEERS)} go together")
    address, count, number = (peers[name] for name in PEERS)
    port = re.fullmatch(r"\S+:(\d{1,5})", address)
    if port is None or not 0 < int(port[1]) < 2**16:
        raise ConfigError(f"--coordinator_address={address} must be HOST:PORT")
    if not 0 <= number < count:
        raise ConfigError(
            f"--process_id={number} must be from 0 to below --num_processes={count}"
        )
    return peers


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


def _told(error: BaseException) -> str:
    # ml_collections wraps the traceback of a config file in a flag error.
    lines = [line for line in str(error).splitlines() if line.strip()]
    last = lines[-1].strip() if lines else type(error).__name__
    if last.endswith("has no attribute 'get_config'"):
        return "the config file defines no get_config()"
    place = place_of(error)
    # Of a wrong flag the innermost frame that is no library's is the one above.
    return last if Path(__file__).name in place else last + place
