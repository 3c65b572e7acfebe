"""Models: pure functions of one example, built by ``dpjax.models.<file>:<builder>``."""
