"""Data sources, and the batches drawn from them.

Reading, checking and augmenting examples belongs here; who is drawn is decided in
``privacy.sampling``.
"""
