"""What a privacy card is about: which run, of which code, on which data and device."""

import dataclasses
import datetime
import functools
import hashlib
import hmac
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dpjax.typing import Params

_UNKNOWN = "unknown: not run from a git clone"
_WITHHELD = "withheld: it would confirm a guess at the private data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """Facts that tell one card from another. All may be published.

    Attributes:
        date: UTC, of the writing: the day only, since times tell of batch sizes.
        commit: Of the clone that ran.
        data: Their fingerprint; of private data under a secret key (``keyed``).
        parameters: SHA-256 of the exported ``params.npz``; None before there is one.
        engine, dtype, device: What computed the sums that noise was added to.
    """

    date: str
    commit: str
    data: str
    parameters: str | None
    engine: str
    dtype: str
    device: str


def about(
    config: Mapping[str, Any], params: Params, *, data_fingerprint: str, secret: bytes
) -> About:
    """Return the facts of a run that goes on, before its export.

    Args:
        config: Of the run.
        params: Shapes and dtypes of all parameters.
        data_fingerprint: See ``dpjax.data.batches.fingerprint``.
        secret: 16 bytes, the run's sampling seed.
    """
    stored = " and ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)}))
    computed = config["model"].get("dtype", stored)
    public = config["data"]["provenance"] == "public"
    if public:
        data = data_fingerprint
    elif config["run"]["seed"] is not None:
        data = _WITHHELD  # its key could be made again from the written seed
    else:
        data = f"{keyed(data_fingerprint, secret)}, keyed by a secret of the run"
    return About(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        commit=_commit(),
        data=data,
        parameters=None,
        engine="plain" if public else config["compute"]["engine"],
        dtype=stored if computed == stored else f"{stored}, computed in {computed}",
        device=jax.devices()[0].device_kind,
    )


def keyed(data_fingerprint: str, secret: bytes) -> str:
    """Return a fingerprint that tells nothing to who does not have ``secret``.

    Whoever knows all examples but one could try candidates for it against a bare
    fingerprint. Under a key that is as random as it is long, HMAC-SHA256 cannot be told
    from chance, and whoever has the run's checkpoints can still prove what it was made of.
    """
    message = f"dpjax data {data_fingerprint}".encode()
    return hmac.new(secret, message, hashlib.sha256).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _commit() -> str:
    package = Path(__file__).parent

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(package), *command],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        return done.stdout.strip()

    try:
        # Not that of a repository which the package is only installed in.
        if Path(git("rev-parse", "--show-toplevel")) != package.parent:
            return _UNKNOWN
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with changes on it" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return _UNKNOWN
