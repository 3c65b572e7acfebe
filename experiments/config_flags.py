"""Command line -> checked config, as plain dicts. Imports neither jax nor absl's app."""

import re
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from dpjax.config import ConfigError, check


def config_from(argv: list[str]) -> tuple[dict[str, Any], Path]:
    """Return the checked config and the workdir that ``argv`` asks for.

    Raises:
        ConfigError: In one line, whatever is wrong.
    """
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    try:
        # Overrides need the config to exist: --config goes first, wherever it stood.
        ordered = sorted(argv, key=lambda text: not text.startswith("--config="))
        rest = values(["train", *ordered])[1:]
    except Exception as error:
        raise ConfigError(_one_line(error)) from error
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}; see --help")
    if holder.value is None:
        raise ConfigError("--config=FILE is missing; see --help")
    config = holder.value.to_dict()
    check(config)
    if values.workdir is None and not config["run"]["dry_run"]:
        raise ConfigError("--workdir=DIR is missing; see --help")
    return config, Path(values.workdir or ".")


def _one_line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip().strip('"')
    return text or type(error).__name__
