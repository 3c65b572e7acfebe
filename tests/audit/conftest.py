"""Compiling is most of what these tests cost: they ask for slow machine code."""

import jax
import pytest

from tests.checks import compiled


@pytest.fixture(autouse=True)
def _compile_fast(monkeypatch):
    monkeypatch.setattr(jax, "jit", compiled)
