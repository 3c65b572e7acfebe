"""What may be published of a run: its parameters, readable by numpy alone, and its card."""

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from dpjax.models.partition import flatten, named_like, unflatten
from dpjax.parallel import processes


def export(directory: Path, params: PyTree[Array], card: Mapping[str, str]) -> None:
    """Write what may be published: the parameters and the privacy card.

    The parameters go to ``params.npz``, one array per leaf, named by the keys on its
    path joined by ``/``: readable by numpy alone. bfloat16, which numpy has not, is
    written as float32. The directory is complete or absent.

    One leaf after the other is brought to the host, whatever devices have its parts. Of
    several processes the first writes, and the others call ``take_part`` meanwhile.

    Args:
        directory: Where to write; must not exist.
        params: Any pytree whose leaves have names of their own; see
            `dpjax.models.partition.flatten`.
        card: The text of each further file, by file name.

    Raises:
        FileExistsError: If `directory` exists.
        ValueError: If `params` or a file name of `card` cannot be stored as described.
    """
    directory = Path(directory).absolute()
    if directory.exists():
        raise FileExistsError(
            f"directory={directory} exists: remove it, or export to a new one"
        )
    for name in card:
        if name == "params.npz" or Path(name).name != name:
            raise ValueError(f"card file name {name!r}: use a plain, unused file name")
    leaves = flatten(params)
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was killed
    unfinished.mkdir()
    try:
        with zipfile.ZipFile(unfinished / "params.npz", "w") as archive:
            for name, leaf in leaves.items():
                array = processes.to_host(leaf)
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.save(file, _as_numpy_has(array), allow_pickle=False)
        for name, text in card.items():
            (unfinished / name).write_text(text, encoding="utf-8")
        unfinished.rename(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def take_part(params: PyTree[Array]) -> None:
    """Give the first process what this one has of each leaf, as ``export`` asks for it."""
    for leaf in flatten(params).values():
        processes.to_host(leaf)


def load_export(directory: Path, *, like: PyTree | None = None) -> Any:
    """Read the parameters that `export` wrote.

    Args:
        directory: Where they are.
        like: The parameters of the model or their shapes, as from
            ``jax.eval_shape(model.init, key, example)``.

    Returns:
        numpy arrays in the containers, and of the dtypes, of `like`; without it, in nested
        dicts: one for each ``/`` in a name.

    Raises:
        ValueError: They are not the parameters of `like`.
    """
    with np.load(Path(directory) / "params.npz", allow_pickle=False) as file:
        arrays = dict(file)
    if like is None:
        return unflatten(arrays)
    try:
        return jax.tree.map(_shaped_like, like, named_like(like, arrays))
    except ValueError as error:
        raise ValueError(f"{directory} does not fit like=: {error}") from error


def _shaped_like(like: Any, array: np.ndarray) -> np.ndarray:
    if array.shape != like.shape:
        raise ValueError(f"shape {array.shape} in it, and {like.shape} in the model")
    return array.astype(like.dtype)


def _as_numpy_has(array: np.ndarray) -> np.ndarray:
    """Return floats of a dtype that is JAX's alone (bfloat16) as float32, exactly."""
    if array.dtype.kind != "V":
        return array
    return array.astype(np.float32)
