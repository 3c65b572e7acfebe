"""Devices, processes and memory: where arrays live and how processes act as one.

Nothing here knows of privacy: draws, noise and sums are the same in every layout.
"""
