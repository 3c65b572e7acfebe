"""A run's own parts held against what its privacy rests on, before its first step.

Checks that every run makes belong here; attacks that somebody chooses to run do not
(``audit``).
"""
