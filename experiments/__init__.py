"""Commands, run as ``python -m experiments.NAME``."""
