"""Audits compute many posteriors."""

import jax
import pytest

from dpjax.audit import bayes


@pytest.fixture(autouse=True, scope="session")
def _optimised_posteriors():
    """Running them costs more than compiling them well."""
    options = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
    fast = jax.jit(bayes.quantiles.__wrapped__, compiler_options=options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bayes, "quantiles", fast)
        yield
