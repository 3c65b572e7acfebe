"""Strict JAX for every test: rank promotion raises, several devices, warnings are errors.

A test may be skipped only for want of a program that a machine need not have; the end of
the output, and ``.cache/not_run``, then say so.
"""

import gc
import os
from pathlib import Path

import hypothesis
import jax
import pytest

from dpjax.parallel.allocator import keep_freed_memory

keep_freed_memory()
# Compiling is most of what the tests cost: this makes slower machine code, several times
# faster. Virtual devices wait for each other however busy the machine is.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
)
# For the workers, which start after this: on two cores more threads wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# The cache is keyed by the program.
jax.config.update("jax_compilation_cache_dir", os.path.abspath(".cache/jax-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# A program, not a test; it needs torch.
collect_ignore = ["golden/make_hf_fixtures.py"]

hypothesis.settings.register_profile("ci", max_examples=25, deadline=None)
hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="module")
def shared_steps():
    """For tests of what is around the step: runs of one config compile it once."""
    from tests.runs import share_steps

    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        yield


def pytest_collection_finish():
    # Tracing makes garbage fast, and little of it goes in circles.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    lines = [f"{report.nodeid}: {report.longrepr[2]}" for report in skipped]
    not_run = Path(".cache/not_run")
    not_run.unlink(missing_ok=True)
    if lines:
        not_run.parent.mkdir(exist_ok=True)
        not_run.write_text("\n".join(lines) + "\n")
        terminalreporter.section("DID NOT RUN", red=True, bold=True)
        terminalreporter.write_line("\n".join(lines), red=True)
