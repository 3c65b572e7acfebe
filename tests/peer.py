"""One process of a run, which may do something to itself: for tests.

``python -m tests.peer EVENT@STEP ARGUMENTS`` is ``python -m experiments.train ARGUMENTS``,
but process 1 sends itself the signal EVENT when the release of STEP is recorded.
"""

import hashlib
import os
import signal
import sys

from dpjax import processes
from dpjax.ledger import Ledger
from experiments.train import main


def sent(event, step):
    """Make process 1 send itself a signal at a step."""
    record = Ledger.record

    def recording(self, number, fingerprint):
        import jax

        if jax.process_index() == 1 and number == int(step):
            os.kill(os.getpid(), getattr(signal, event))
        record(self, number, fingerprint)

    Ledger.record = recording


def told():
    """Make each process print a digest of the state that it starts with."""
    from dpjax import train

    init_state = train.init_state

    def telling(*args):
        state = init_state(*args)
        print("starts with", digest(state), flush=True)
        return state

    train.init_state = telling


def digest(state):
    """Return a digest of what this process holds: on this mesh, half of the devices."""
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
    sent(*sys.argv[1].split("@"))
    sys.exit(main(sys.argv[2:]))
