"""A folder of images, decoded once and held in memory."""

import hashlib
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from dpjax.checks import check_path
from dpjax.data.arrays import ArraySource

SUFFIXES = (".jpg", ".jpeg", ".png")


def image_folder(*, path: str, split: str, cache: str | None) -> ArraySource:
    """Read the images ``<path>/<split>/<class>/*.{jpg,jpeg,png}``, all of one size.

    Labels are the positions of the class names in alphabetical order, over the class
    folders of ALL splits, so that a class missing from one split shifts no label there.

    Args:
        path: The folder of the splits.
        split: Name of the split's folder, such as "train".
        cache: Folder for the decoded pixels, made if needed; None for no cache. A
            cached file is used again while the names, sizes and modification times of
            the images are the same. It holds the data: protect it like the data.

    Returns:
        A source of ``image`` float32 [H, W, C] in [0, 1] (C is 1 for gray, 3 for RGB)
        and ``label`` int32 [].

    Raises:
        FileNotFoundError: If there is no such split.
        ValueError: If a class folder has no images, or if a file cannot be read or
            differs in size from the others: names up to 5 of them.
    """
    check_path("path", path)
    root = pathlib.Path(path)
    folders = sorted(p for p in root.glob(f"{split}/*") if p.is_dir())
    if not folders:
        raise FileNotFoundError(f"{path}/{split} has no class folders")
    classes = sorted({p.name for p in root.glob("*/*") if p.is_dir()})
    files, labels = [], []
    for folder in folders:
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"{folder} has no {', '.join(SUFFIXES)} files; remove it")
        files += found
        labels += [classes.index(folder.name)] * len(found)
    images = _decode(files) if cache is None else _cached(files, pathlib.Path(cache))
    return ArraySource(
        {"image": images, "label": np.array(labels, np.int32)}, pixels=("image",)
    )


def decode_image(file: pathlib.Path | BinaryIO, *, name: str) -> np.ndarray:
    """Decode one image to uint8 [H, W, 1] (gray) or [H, W, 3] (RGB).

    Raises:
        ValueError: With ``name``, if it cannot be decoded or is neither gray nor RGB.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            pixels, mode = np.asarray(image), image.mode
    except Exception as error:  # damaged bytes can break a decoder in any way
        raise ValueError(f"{name} cannot be decoded: {error}") from error
    if mode not in ("L", "RGB"):
        raise ValueError(f"{name} has mode {mode}, convert it to L (gray) or RGB")
    return pixels.reshape(*pixels.shape[:2], -1)


def check_shape(image: np.ndarray, shape: tuple[int, ...], *, name: str) -> None:
    """Raise ValueError with ``name`` unless the image has this shape."""
    if image.shape != shape:
        raise ValueError(f"{name} has shape {image.shape}, the first image {shape}")


def _decode(files: Sequence[pathlib.Path]) -> np.ndarray:
    """Decode into uint8 [N, H, W, C], or raise with the names of the bad files."""
    # No threads: for small images they were slower (the interpreter lock dominates).
    images, faults = None, []
    for row, file in enumerate(files):
        try:
            image = decode_image(file, name=str(file))
            if images is None:
                images = np.empty((len(files), *image.shape), np.uint8)
            check_shape(image, images.shape[1:], name=str(file))
            images[row] = image
        except ValueError as error:
            faults.append(str(error))
    if faults or images is None:
        shown = "; ".join(faults[:5])
        raise ValueError(f"{len(faults)} of {len(files)} images are unusable: {shown}")
    return images


def _cached(files: Sequence[pathlib.Path], cache: pathlib.Path) -> np.ndarray:
    """Return the decoded files from ``cache``, decoding them if they are not there."""
    key = hashlib.sha256()
    for file in files:
        stat = file.stat()
        key.update(f"{file.absolute()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    path = cache / f"{key.hexdigest()[:32]}.npy"
    if not path.exists():
        images = _decode(files)
        cache.mkdir(parents=True, exist_ok=True)
        # Renaming is atomic: another run, or one after a crash, never sees half a file.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            np.save(f"{folder}/images.npy", images)
            os.replace(f"{folder}/images.npy", path)
    try:
        return np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it") from error
