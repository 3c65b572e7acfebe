"""Strict JAX for every test: rank promotion raises, several devices, warnings are errors."""

import os

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Recompiling is most of what the tests cost; the cache is keyed by the program.
jax.config.update("jax_compilation_cache_dir", os.path.abspath(".cache/jax-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

hypothesis.settings.register_profile("ci", max_examples=25, deadline=None)
hypothesis.settings.load_profile("ci")
