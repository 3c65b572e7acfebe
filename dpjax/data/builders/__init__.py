"""TFDS builders that prepare local archives without TensorFlow."""
