"""A run: what its config names, the only loop, and what it leaves behind.

What is needed to run a plan from start to end belongs here; what a step computes does
not (``clipping``, ``mechanisms``, ``privacy``). Importing this room does not import jax.
"""
