"""Where secrets come from: the operating system, or a seed that a config fixes."""

import hashlib
import os


def entropy(purpose: str, *, seed: int | None) -> bytes:
    """Return 16 bytes: from the OS, or derived from ``seed`` and ``purpose``.

    A written seed protects nobody: the privacy card of such a run says "not private".
    """
    if seed is None:
        return os.urandom(16)
    return hashlib.sha256(f"dpjax {purpose} {seed}".encode()).digest()[:16]
