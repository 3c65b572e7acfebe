"""What several commands share: options, flags, clocks, tables and scores.

What only one kind of command needs does not belong here (``benchmarks``, ``audits``,
``sweeps``).
"""
