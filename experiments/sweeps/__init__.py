"""Sweeps: how they are written, run and summed up, and a file for each that was run.

What ``ablate`` and ``gather`` are made of belongs here; results do not (``results``).
"""
