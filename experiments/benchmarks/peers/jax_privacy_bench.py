"""Measure jax_privacy on the workloads of the benchmark, on CPU.

    python -m experiments.benchmarks.peers.jax_privacy_bench --out=FILE.json
        [--workloads=A,B] [--rounds=N]

In the root of the repository, with the Python of an environment made from
jax_privacy.txt. Losses and programs without privacy are those of
`experiments.benchmark`. max_rel_error compares microbatches with the whole batch.
"""

import functools
import os
import sys
from typing import Any

from experiments.benchmarks.peers import common


def measure(name: str, *, rounds: int) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of one workload and the name of their baseline."""
    from experiments.benchmarks import suite, workloads

    workload = workloads.build(name)
    whole = {"jax_privacy": functools.partial(_clipped, workload.loss, None)}
    sliced = {
        f"jax_privacy_mb{size}": functools.partial(_clipped, workload.loss, size)
        for size in suite.slice_sizes(workload)
    }
    return suite.compare(workload, whole, sliced, rounds=rounds)


def _clipped(
    loss: Any, size: int | None, params: Any, batch: Any, key: Any, clip_norm: Any
) -> tuple[Any, Any]:
    """Return the clipped sum and the norms, as ``experiments.benchmarks.programs.Program``."""
    import jax_privacy  # pyrefly: ignore[missing-import]

    gradient = jax_privacy.clipped_grad(
        loss,
        l2_clip_norm=clip_norm,
        batch_argnums=1,
        prng_argnum=2,
        keep_batch_dim=False,
        return_grad_norms=True,
        microbatch_size=size,
    )
    total, auxiliary = gradient(params, batch.examples, key)
    return total, auxiliary.grad_norms


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    return common.main(
        argv,
        measure,
        module="experiments.benchmarks.peers.jax_privacy_bench",
        usage=__doc__,
        packages=("jax", "jaxlib", "jax_privacy"),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
