"""A plan carried out on a batch: backward passes, each example's own key, the clipped sum.

What runs for the examples of a batch, whatever the engine, belongs here; decisions do
not (``planning``).
"""
