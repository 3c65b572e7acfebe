"""Norms, factors and weighted sums at one use of a parameter, and what rounding does to them.

Formulas on arrays belong here; which of them is used does not (``planning``), nor how a
backward pass gets the arrays (``execution``).
"""
