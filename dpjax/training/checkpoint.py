"""Checkpoints that are complete or absent, verified when read, and kept private.

A checkpoint holds everything a run needs to go on bit for bit: parameters, optimizer
state, secret noise keys, the sampling seed, error-feedback memory. It is SENSITIVE:
whoever reads it can subtract the noise, so no privacy guarantee covers it. Its
directory is made accessible to its owner only (mode 0700); what `dpjax.training.export` writes
is what to publish.

Orbax makes each save atomic, but does not notice flipped bits in array files. Every
leaf is therefore saved with a fingerprint of its values, which is compared after
loading. That finds accidents; it does not stop someone who wants to tamper.

With several processes every call is collective, all leaves must be global arrays, and
all processes must see the same directory.
"""

import contextlib
import datetime
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from orbax.checkpoint import v1

from dpjax.parallel.processes import barrier
from dpjax.privacy.fingerprint import fingerprint

ocp: Any = v1  # its own annotations reject the paths and arrays it accepts

_log = logging.getLogger(__name__)

_OWNER_ONLY = 0o700
_UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's suffix for a save in progress


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none can be used."""


class _Corrupt(Exception):
    """One checkpoint holds other values than were saved, or cannot be decoded."""


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one run, one sub-directory per step.

    Use it as a context manager, and only one per directory at a time: construction
    removes what interrupted saves left behind, and would remove a save in progress.

    Args:
        directory: Created if absent, and made accessible to its owner only.
        keep: How many of the newest checkpoints to keep, at least 1. Quarantined ones
            are not counted, and never deleted.

    Raises:
        ValueError: ``keep`` is less than 1.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._saving: tuple[int, Any] | None = None  # step and Orbax's response
        if jax.process_index() == 0:
            self.directory.mkdir(mode=_OWNER_ONLY, parents=True, exist_ok=True)
            self.directory.chmod(_OWNER_ONLY)
            self._remove_unfinished()
        barrier("dpjax_checkpoints_opened")

    def __exit__(self, *_) -> None:
        self.wait()

    @property
    def latest(self) -> int | None:
        """The newest step on disk, not yet verified, or None."""
        return max(self._steps(), default=None)

    def save(
        self,
        step: int,
        state: PyTree[Array],
        *,
        metadata: Mapping[str, Any],
        wait: bool = False,
    ) -> None:
        """Start to save a checkpoint; the arrays may be donated on return.

        Args:
            step: Later than every step saved before.
            state: Pytree of jax arrays, typed keys included.
            metadata: JSON-able facts about the run (config, versions), for `metadata`.
            wait: Return only when the checkpoint is complete on disk.

        Raises:
            CheckpointError: If this save, or the one before in the background, failed.
            TypeError: If a leaf is not a jax array.
            ValueError: If `step` is not later than `latest`, or `metadata` not JSON.
        """
        self.wait()
        if self.latest is not None and step <= self.latest:
            raise ValueError(f"step={step} must be later than latest={self.latest}")
        leaves = _named_leaves(state)
        for name, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(
                    f"state{name} is a {type(leaf).__name__}: make it a jax array"
                )
        record = {
            "metadata": metadata,
            "signatures": _signatures(leaves),
            "fingerprints": _fingerprints(leaves),
        }
        sealed = _seal(record)
        # Orbax refuses arrays without elements; their signature is enough.
        stored = {name: leaf for name, leaf in leaves.items() if leaf.size}
        context = ocp.Context()
        context.file.path_permission_mode = _OWNER_ONLY
        with self._naming_failure(step), context:
            response = ocp.save_async(
                self.directory / str(step), stored, custom_metadata=sealed
            )
        self._saving = step, response
        if wait:
            self.wait()

    def restore(
        self, like: PyTree, *, step: int | None = None
    ) -> tuple[int, PyTree[Array]] | None:
        """Load the newest checkpoint whose values are those that were saved.

        A checkpoint with other values, or one that cannot be decoded, is reported by a
        warning and renamed to ``corrupt-STEP-TIME``; the one before it is tried.

        Args:
            like: Tree of arrays or `jax.ShapeDtypeStruct` with the structure, shapes
                and dtypes of the saved state. Each leaf is placed by the sharding it
                has here; without one, or if it is not committed to its device, the
                loaded leaf is not committed either.
            step: Only the checkpoint of this step; None for the newest that is usable.

        Returns:
            The step and its state, or None if there has never been a checkpoint.

        Raises:
            CheckpointError: If `like` differs from what was saved, or if checkpoints
                were made but none is usable.
            ValueError: If there is no checkpoint of `step`.
            OSError: If a file cannot be read at the moment. Nothing is renamed.
        """
        self.wait()
        if step is not None:
            return self._one(step, like)
        for number in reversed(self._steps()):
            try:
                return number, self._load(number, like)
            except _Corrupt as problem:
                self._quarantine(number, str(problem))
        return self._none_usable()

    def metadata(self) -> dict[str, Any] | None:
        """Read the metadata of the newest checkpoint, without its arrays.

        Returns:
            What was passed to `save`, as JSON gives it back (tuples are lists). None if
            there has never been a checkpoint.

        Raises:
            CheckpointError: If checkpoints were made but none has readable metadata.
            OSError: If a file cannot be read at the moment.
        """
        self.wait()
        for step in reversed(self._steps()):
            try:
                return _read_record(self.directory / str(step))["metadata"]
            except _Corrupt:
                continue  # `restore` is the one that reports and renames it
        return self._none_usable()

    def wait(self) -> None:
        """Wait until the save in the background, if any, is complete.

        Raises:
            CheckpointError: If it failed.
        """
        if self._saving is None:
            return
        step, response = self._saving
        with self._naming_failure(step):
            response.result()
        self._saving = None
        if jax.process_index() == 0:
            for old in self._steps()[: -self._keep]:
                # Renamed first: a half-deleted checkpoint must not look like one.
                unfinished = self.directory / f"{old}{_UNFINISHED}"
                (self.directory / str(old)).rename(unfinished)
                shutil.rmtree(unfinished)

    def _steps(self) -> list[int]:
        return sorted(
            int(path.name)
            for path in self.directory.iterdir()
            if re.fullmatch("0|[1-9][0-9]*", path.name) and path.is_dir()
        )

    def _remove_unfinished(self) -> None:
        for path in self.directory.glob(f"*{_UNFINISHED}*"):
            shutil.rmtree(path)

    @contextlib.contextmanager
    def _naming_failure(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._saving = None
            if jax.process_index() == 0:
                self._remove_unfinished()
            intact = (
                "there is no earlier checkpoint"
                if self.latest is None
                else f"the previous checkpoint, of step {self.latest}, is intact"
            )
            raise CheckpointError(
                f"saving step {step} to {self.directory} failed; {intact}: "
                f"{_first_line(error)}"
            ) from error

    def _load(self, step: int, like: PyTree) -> PyTree[Array]:
        path = self.directory / str(step)
        record = _read_record(path)
        likes = _named_leaves(like)
        _check_structure(record["signatures"], _signatures(likes), step=step)
        stored = _load_arrays(path, {n: x for n, x in likes.items() if x.size})
        leaves = {n: _place(stored.get(n), x) for n, x in likes.items()}
        # Orbax gives a key back as plain integers if one of its files is lost.
        for field, found in (
            ("signatures", _signatures(leaves)),
            ("fingerprints", _fingerprints(leaves)),
        ):
            for name in leaves:
                if found[name] != record[field][name]:
                    raise _Corrupt(f"state{name} differs from what was saved")
        return jax.tree.unflatten(jax.tree.structure(like), leaves.values())

    def _one(self, step: int, like: PyTree) -> tuple[int, PyTree[Array]]:
        if step not in self._steps():
            raise ValueError(f"{step=} has no checkpoint, only {self._steps()}")
        try:
            return step, self._load(step, like)
        except _Corrupt as problem:
            raise CheckpointError(
                f"checkpoint {step} is corrupt: {problem}"
            ) from problem

    def _quarantine(self, step: int, problem: str) -> None:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        target = self.directory / f"corrupt-{step}-{now}"
        _log.warning(
            "checkpoint %d is corrupt: %s; it becomes %s", step, problem, target
        )
        if jax.process_index() == 0:
            (self.directory / str(step)).rename(target)
        barrier(f"dpjax_checkpoint_{step}_quarantined")

    def _none_usable(self) -> None:
        if self._steps() or any(self.directory.glob("corrupt-*")):
            raise CheckpointError(
                f"every checkpoint in {self.directory} is corrupt: bring one back from "
                "a backup, or use a new directory to start afresh"
            )


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves by their path, in the order of `jax.tree.leaves`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _signatures(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _fingerprints(leaves: Mapping[str, Array]) -> dict[str, int]:
    # One program per shape, since leaves may live on different devices.
    # One after the other: on CPU, devices that wait for those of another process in one
    # program would leave no thread to the next, for which the others wait.
    return {name: int(jax.device_get(_jitted(leaf))) for name, leaf in leaves.items()}


_jitted = jax.jit(fingerprint)


def _seal(record: dict[str, Any]) -> dict[str, str]:
    """As one JSON text with its digest, so that damage to it is noticed too."""
    try:
        text = json.dumps(record, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be JSON: {error}") from error
    return {"record": text, "sha256": _digest(text)}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_record(path: Path) -> dict[str, Any]:
    try:
        sealed = ocp.metadata(path).custom_metadata or {}
        if sealed.get("sha256") == _digest(sealed.get("record", "")):
            return json.loads(sealed["record"])
        problem = "its metadata differ from those saved"
    except Exception as error:  # noqa: BLE001 (Orbax raises many types)
        problem = f"its metadata cannot be decoded: {_first_line(error)}"
    _require_readable(path, problem)
    raise _Corrupt(problem)


def _check_structure(saved: dict[str, str], here: dict[str, str], *, step: int) -> None:
    for name in here | saved:
        theirs, ours = saved.get(name, "absent"), here.get(name, "absent")
        if theirs != ours:
            raise CheckpointError(
                f"checkpoint {step} is of another model or optimizer: state{name} is "
                f"{theirs} in the checkpoint and {ours} here"
            )


def _load_arrays(path: Path, likes: dict[str, Any]) -> dict[str, Array]:
    wanted = {name: _abstract(leaf) for name, leaf in likes.items()}
    try:
        return ocp.load(path, wanted)
    except Exception as error:
        _require_readable(path, _first_line(error))
        # A shortage of memory or a wrong sharding is not the checkpoint's fault: it is
        # corrupt only if some leaf cannot be decoded alone.
        if (problem := _undecodable(path, wanted)) is None:
            raise
        raise _Corrupt(problem) from error


def _undecodable(path: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> str | None:
    """Which leaf cannot be decoded to host memory, and why; None if all can."""
    for name, leaf in wanted.items():
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        alone = _unplaced(leaf) if is_key else np.empty(leaf.shape, leaf.dtype)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        try:
            with context:
                ocp.load(path, {name: alone})
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 (Orbax raises many types)
            return f"state{name} cannot be decoded: {_first_line(error)}"
    return None


def _require_readable(path: Path, problem: str) -> None:
    """Separate files that cannot be read now from files with wrong contents.

    Raises:
        OSError: The file system's own, for the first file that cannot be read.
        CheckpointError: If there are several processes. Only some of them may have
            seen the problem, so that they cannot go on together.
    """

    def fail(error: OSError) -> None:
        raise error

    for folder, _, names in os.walk(path, onerror=fail):
        for name in names:
            with open(Path(folder) / name, "rb") as file:
                while file.read(1 << 24):
                    pass
    if jax.process_count() > 1:
        raise CheckpointError(
            f"checkpoint {path} cannot be decoded ({problem}): if it is corrupt, "
            f"rename it to corrupt-{path.name} and start again"
        )


def _is_placed(like: Any) -> bool:
    """Whether the leaf says where it belongs, and not just where it happens to be."""
    has_sharding = getattr(like, "sharding", None) is not None
    return has_sharding and getattr(like, "committed", True)


def _abstract(like: Any) -> jax.ShapeDtypeStruct:
    if not _is_placed(like):
        return _unplaced(like)
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding)


def _unplaced(like: Any) -> jax.ShapeDtypeStruct:
    # Orbax insists on a sharding; `_place` undoes it.
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=device)


def _place(loaded: Array | None, like: Any) -> Array:
    """Give a loaded leaf (None if it has no elements) the placement of `like`."""
    if loaded is None:
        device = like.sharding if _is_placed(like) else None
        return jnp.empty(like.shape, like.dtype, device=device)
    if _is_placed(like):
        return loaded
    if jnp.issubdtype(loaded.dtype, jax.dtypes.prng_key):
        data = jnp.array(np.asarray(jax.random.key_data(loaded)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(loaded))
    return jnp.array(np.asarray(loaded))


def _first_line(error: BaseException) -> str:
    text = str(error).partition("\n")[0][:300]
    return f"{type(error).__name__}: {text}"
