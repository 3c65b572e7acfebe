"""TFDS builders that prepare local archives without TensorFlow.

One file for each kind of archive; what reads prepared data does not belong here.
"""
