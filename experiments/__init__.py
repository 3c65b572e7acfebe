"""Commands, run as ``python -m experiments.NAME``.

Here stand commands alone: thin, readable from top to bottom. What they are made of has a
room below; what a library user needs belongs in ``dpjax``.
"""
