"""What the benchmarks measure, how, and the pages that are commands of their own.

Workloads, programs and clocks of measurements belong here; results do not (``results``).
"""
