"""Where secrets come from: the operating system, or a seed that a config fixes."""

import hashlib
import os


def entropy(purpose: str, *, seed: int | None) -> bytes:
    """Return 16 bytes: from the OS, or derived from ``seed`` and ``purpose``.

    A written seed protects nobody: the privacy card of such a run says "not private".

    Raises:
        ValueError: ``seed`` is no integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | None):
        raise ValueError(f"seed={seed!r} must be an integer, or None for a secret one")
    if seed is None:
        return os.urandom(16)
    return hashlib.sha256(f"dpjax {purpose} {seed}".encode()).digest()[:16]
