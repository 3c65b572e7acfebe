"""A stand-in for a trainer: its processes find each other and add up their numbers."""

import sys

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils


def main(argv):
    flags = dict(flag.removeprefix("--").split("=") for flag in argv)
    assert flags.pop("distributed", "auto") == "auto"  # the scheduler is asked
    address = flags.pop("coordinator_address", None)
    jax.distributed.initialize(address, **{k: int(v) for k, v in flags.items()})
    index, count = jax.process_index(), jax.process_count()
    total = multihost_utils.process_allgather(jnp.asarray(index + 1)).sum()
    devices = jax.local_device_count()
    # On a line of its own: what Gloo says may stop within one. In one piece: print would
    # write the end of the line by itself where output is not buffered.
    sys.stdout.write(f"\nprocess {index} of {count}, {devices} devices: {total}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
