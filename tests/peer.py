"""One process of a run, which may do something to itself: for tests.

``python -m tests.peer EVENT@STEP ARGUMENTS`` is ``python -m experiments.train ARGUMENTS``,
but process 1 sends itself the signal EVENT when the release of STEP is recorded. With SIGTERM
both processes then wait for what JAX does in the background: it looks for the signal once a
second, in which a short run may end. With RLIMIT_AS or RLIMIT_DATA, STEP is how many bytes
each process may take from its start on.
"""

import hashlib
import os
import resource
import signal
import sys
import time

from dpjax.parallel import processes
from dpjax.training.ledger import Ledger
from experiments.train import main

# Where JAX keeps the steps from which it takes the one to stop after.
STEPS_REACHED = "PREEMPTION_CURRENT_COUNTER/"


def sent(event, step):
    """Make process 1 send itself a signal at a step, and all wait until it is heeded."""
    record = Ledger.record

    def recording(self, number, fingerprint):
        import jax

        if number == int(step):
            if jax.process_index() == 1:
                os.kill(os.getpid(), getattr(signal, event))
            if event == "SIGTERM":
                wait_until_all_were_told(jax.process_count())
        record(self, number, fingerprint)

    Ledger.record = recording


def limited(kind, size):
    """Let this process take ``size`` bytes more than it has when its config is checked."""
    from dpjax.training import opening

    check_parts = opening.check_parts

    def limiting(experiment):
        with open("/proc/self/statm") as file:
            pages = [int(count) for count in file.read().split()]
        taken = pages[{"RLIMIT_AS": 0, "RLIMIT_DATA": 5}[kind]] * resource.getpagesize()
        limits = (taken + int(size), resource.RLIM_INFINITY)
        resource.setrlimit(getattr(resource, kind), limits)
        return check_parts(experiment)

    opening.check_parts = limiting


def wait_until_all_were_told(count):
    """Wait until each process has told the others which step it has come to."""
    from jax._src.distributed import global_state

    while len(global_state.client.key_value_dir_get(STEPS_REACHED)) < count:
        time.sleep(0.01)


def told():
    """Make each process print a digest of the state that it starts with."""
    from dpjax.training import opening

    init_state = opening.init_state

    def telling(*args):
        state = init_state(*args)
        print("starts with", digest(state), flush=True)
        return state

    opening.init_state = telling


def digest(state):
    """Return a digest of what this process holds: a replica, if the mesh says so."""
    import jax
    import numpy as np

    text = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        for shard in leaf.addressable_shards:
            text.update(np.asarray(shard.data).tobytes())
    return text.hexdigest()


if __name__ == "__main__":
    told()
    processes.HEARTBEAT_TIMEOUT = 8  # a third of the time to wait for the dead
    event = sys.argv[1].split("@")
    (limited if event[0].startswith("RLIMIT") else sent)(*event)
    sys.exit(main(sys.argv[2:]))
