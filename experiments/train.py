"""Train a model with differential privacy.

    python -m experiments.train --config=configs/digits_mlp_dpsgd.py[:variant] \
        --workdir=DIR [--config.group.key=value ...]

--config=FILE[:VARIANT]   a config file; see configs/
--workdir=DIR             receives checkpoints, metrics, privacy card and export; a run
                          that DIR already holds is resumed
--config.GROUP.KEY=VALUE  change one key of the config
--config.run.dry_run=True print the plan and the privacy card, train nothing

Exit status: 0 done, 2 wrong config or input, 75 interrupted by a signal (run the same
command again to go on), 130 stopped at once, 1 stopped for another reason.
"""

import os
import sys
from pathlib import Path

from dpjax.config import ConfigError
from experiments.config_flags import config_from


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        config, workdir = config_from(argv)
        return _run(config, workdir)
    except (ConfigError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint is intact", file=sys.stderr)
        return 130


def _run(config: dict, workdir: Path) -> int:
    # Compiled programs are kept between runs; secrets are arguments, never constants.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(".cache") / "jax"))
    from dpjax import train
    from dpjax.checkpoint import CheckpointError
    from dpjax.ledger import NoiseReuseError

    if config["run"]["dry_run"]:
        print(train.plan(config))
        return 0
    try:
        train.train(config, workdir)
    except train.Interrupted as interrupted:
        print(f"interrupted: {interrupted}; run the same command to go on")
        return os.EX_TEMPFAIL
    except (CheckpointError, NoiseReuseError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
