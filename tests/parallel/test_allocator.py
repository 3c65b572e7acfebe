"""Memory that is freed stays with the process, once it was told to keep it."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import numpy as np
from dpjax.parallel.allocator import keep_freed_memory

def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096 / 2**20

if sys.argv[1] == "kept":
    keep_freed_memory()
before = resident()
block = np.ones(2**25)  # 256 MiB
del block
print(resident() - before)
"""


@pytest.mark.parametrize(("how", "stays"), [("kept", True), ("default", False)])
def test_freed_memory_stays_if_it_is_to_be_kept(how, stays):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True
    )
    assert (float(done.stdout) > 200) == stays
