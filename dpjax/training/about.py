"""Which code, packages and device ran, and what a privacy card is about.

Imports no framework until it is asked for the device.
"""

import dataclasses
import datetime
import functools
import hashlib
import hmac
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from dpjax.typing import Params

PACKAGES = ("dpjax", "jax", "jaxlib", "numpy", "flax", "optax", "dp-accounting")
"""Those that decide what is computed."""

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
    config: Mapping[str, Any], params: "Params", *, data_fingerprint: str, secret: bytes
) -> About:
    """Return the facts of a run that goes on, before its export.

    Args:
        config: Of the run.
        params: Shapes and dtypes of all parameters.
        data_fingerprint: See ``dpjax.data.batches.fingerprint``.
        secret: 16 bytes, the run's sampling seed.
    """
    import jax

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
        commit=_commit_text(),
        data=data,
        parameters=None,
        engine="plain" if public else config["compute"]["engine"],
        dtype=stored if computed == stored else f"{stored}, computed in {computed}",
        device=device(),
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


class Checkout(NamedTuple):
    """A commit, and whether its files were changed since."""

    commit: str
    changed: bool


@functools.cache
def checkout(*, untracked: bool = False) -> Checkout | None:
    """Return what the package runs from; None if that is no git clone of it.

    Args:
        untracked: Whether files that git does not know count as changes.
    """
    here = Path(__file__)

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here.parent), *command],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        return done.stdout.strip()

    files = "normal" if untracked else "no"
    try:
        # Not that of a repository which the package is only installed in.
        if Path(git("rev-parse", "--show-toplevel")) / "dpjax" not in here.parents:
            return None
        changed = bool(git("status", "--porcelain", f"--untracked-files={files}"))
        return Checkout(git("rev-parse", "HEAD"), changed)
    except (OSError, subprocess.SubprocessError):
        return None


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of installed packages."""
    return {name: importlib.metadata.version(name) for name in packages}


def device() -> str:
    """Return the kind of device that JAX computes on."""
    import jax

    return jax.devices()[0].device_kind


def software() -> dict[str, str]:
    """Return what ``python -m dpjax --version`` prints: packages, commit and device."""
    try:
        found = device()
    except RuntimeError as error:  # the device of a broken installation
        found = f"none: {error}"
    facts = {"python": platform.python_version(), "commit": _commit_text()}
    return versions() | facts | {"device": found}


def _commit_text() -> str:
    found = checkout()
    if found is None:
        return _UNKNOWN
    return found.commit + (" with changes on it" if found.changed else "")
