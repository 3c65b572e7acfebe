"""Which way to a clipped sum is taken, decided from shapes alone.

Choices, and estimates of time and memory, belong here; nothing is computed here from
values of a batch.
"""
