"""A stand-in for a trainer: its processes find each other and add up their numbers.

    python -m tests.launch.peers [--flags of launch] [TASK]

TASK sum prints the sum; hang waits for SIGTERM and saves (exit status 75); die does so in
all processes but the last, which fails.
"""

import signal
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

flags = dict(a[2:].split("=") for a in sys.argv[1:] if a.startswith("--"))
task = next((a for a in sys.argv[1:] if not a.startswith("--")), "sum")
numbers = {k: int(v) for k, v in flags.items() if k != "coordinator_address"}
jax.distributed.initialize(flags.get("coordinator_address"), **numbers)
index, count = jax.process_index(), jax.process_count()
everyone = multihost_utils.process_allgather(jnp.asarray(index + 1))
print(f"process {index} of {count}: {jax.local_device_count()} devices, sum {everyone.sum()}", flush=True)
