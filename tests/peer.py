"""One process of a run, which may do something to itself: for tests.

``python -m tests.peer EVENT@STEP ARGUMENTS`` is ``python -m experiments.train ARGUMENTS``,
but process 1 sends itself the signal EVENT when the release of STEP is recorded.
"""

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


if __name__ == "__main__":
    processes.HEARTBEAT_TIMEOUT = 8  # a third of the time to wait for the dead
    sent(*sys.argv[1].split("@"))
    sys.exit(main(sys.argv[2:]))
