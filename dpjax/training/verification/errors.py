"""What a check of a run's own parts raises."""

from dpjax.training.config import ConfigError


class SelfCheckError(ConfigError):
    """A part of the run does not do what its privacy rests on."""
