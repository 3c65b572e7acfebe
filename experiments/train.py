"""Train a model with differential privacy.

    python -m experiments.train --config=configs/digits_mlp_dpsgd.py[:variant] \
        --workdir=DIR [--config.group.key=value ...]

--config=FILE[:VARIANT]   a config file; see configs/
--workdir=DIR             receives checkpoints, metrics, privacy card and export; a run
                          that DIR already holds is resumed
--config.GROUP.KEY=VALUE  change one key of the config
--config.run.dry_run=True print the plan and the privacy card, train nothing
--config.run.self_check=True  first test loss, engine, sampler, noise and update on a few
                          real examples (dpjax.training.verification.self_check)

One of several processes that train together, each started with the same command and
--coordinator_address=HOST:PORT --num_processes=N --process_id=I (from 0, on HOST), or with
--distributed=auto  under Slurm, Open MPI, Kubernetes or on a TPU pod, which say all this

Exit status: 0 done, 2 wrong config or input, 75 interrupted by a signal (run the same
command again to go on), 130 stopped at once, 1 stopped for another reason.
"""

import os
import signal
import sys
from contextlib import nullcontext
from types import FrameType

from dpjax.training.config import ConfigError
from experiments.shared import options
from experiments.shared.config_flags import Command, command_from


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    old = signal.signal(signal.SIGTERM, _stopped_early)
    try:
        return _run(command_from(argv))
    except (ConfigError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint is intact", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, old)


def _stopped_early(number: int, frame: FrameType | None) -> None:
    """Leave: the loop, which has a handler of its own, has not begun or is over."""
    del number, frame
    print("interrupted outside of the steps; run the same command to go on")
    raise SystemExit(os.EX_TEMPFAIL)


def _run(command: Command) -> int:
    options.keep_programs()
    import jax

    from dpjax.clipping.planning.planner import MemoryBudgetError
    from dpjax.parallel import processes
    from dpjax.parallel.allocator import keep_freed_memory
    from dpjax.training import opening, train
    from dpjax.training.checkpoint import CheckpointError
    from dpjax.training.ledger import NoiseReuseError

    if command.config["run"]["dry_run"]:
        print(opening.plan(command.config))
        return 0
    keep_freed_memory()
    peers = command.peers
    try:
        with nullcontext() if peers is None else processes.joined(**peers):
            train.train(command.config, command.workdir)
    except (processes.StartError, MemoryBudgetError) as error:
        raise ConfigError(str(error)) from error
    except train.Interrupted as interrupted:
        print(f"interrupted: {interrupted}; run the same command to go on")
        return os.EX_TEMPFAIL
    except (
        CheckpointError,
        NoiseReuseError,
        FloatingPointError,
        processes.PeerError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (jax.errors.JaxRuntimeError, ValueError, MemoryError) as error:
        if not processes.is_exhausted(error):
            raise
        first = str(error).partition("\n")[0][:200]
        print(
            "error: a device has too little memory: lower "
            "config.compute.physical_batch_size or microbatch_size, or raise "
            f"config.mesh.fsdp (--config.run.dry_run=True tells what each holds): {first}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
