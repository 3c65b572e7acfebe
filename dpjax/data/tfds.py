"""Data sets prepared by TensorFlow Datasets, read without TensorFlow."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpjax.data.arrays import ArraySource, check_indices, scale_pixels, slices


class Field(NamedTuple):
    """How one feature of a record is read.

    Attributes:
        shape: Its fixed shape.
        dtype: The dtype in which it is held in memory.
        is_pixels: Whether it is scaled from uint8 to float32 in [0, 1] when read.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    is_pixels: bool


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource:
    """A prepared data set whose records are decoded at each read.

    Attributes:
        records: What ``builder.as_data_source(split)`` returns.
        fields: The features to read.
    """

    records: Any
    fields: Mapping[str, Field]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        rows = check_indices(indices, length=len(self))
        return scale_pixels(self._decode(rows.tolist()), keys=self._pixels)

    def load(self) -> ArraySource:
        """Decode every record once, into memory; pixels stay uint8."""
        parts = [self._decode(indices) for indices in slices(len(self))]
        arrays = {key: np.concatenate([p[key] for p in parts]) for key in self.fields}
        return ArraySource(arrays, pixels=self._pixels)

    @property
    def _pixels(self) -> tuple[str, ...]:
        return tuple(key for key, field in self.fields.items() if field.is_pixels)

    def _decode(self, indices: list[int]) -> dict[str, np.ndarray]:
        examples = self.records.__getitems__(indices)  # a list: an array fails in TFDS

        def stack(key: str, field: Field) -> np.ndarray:
            values = np.array([example[key] for example in examples], field.dtype)
            return values.reshape(len(indices), *field.shape)

        return {key: stack(key, field) for key, field in self.fields.items()}


def tfds_source(
    *,
    name: str,
    data_dir: str,
    split: str,
    features: tuple[str, ...],
    in_memory: bool,
) -> TfdsSource | ArraySource:
    """Open a data set that was prepared with ``file_format="array_record"``.

    Args:
        name: TFDS name with its version, such as "cifar10:3.0.2" or
            "image_archive/pets:1.0.0".
        data_dir: Folder where TFDS keeps its prepared data sets.
        split: TFDS split, such as "train" or "train[:90%]".
        features: The features to read. Images (uint8) become float32 in [0, 1], class
            labels int32; other numeric features keep their dtype.
        in_memory: Decode everything now, with images kept as uint8. Gathering from
            memory is about 100 times faster than decoding at each read.

    Returns:
        A source with ``features`` as keys.

    Raises:
        FileNotFoundError: If the data set is not prepared under ``data_dir``.
        ValueError: If it is prepared in a format without random access, if it has no
            such split or features, or if a feature is not numeric with a fixed shape.
    """
    folder = pathlib.Path(data_dir, name.replace(":", "/"))
    if not (folder / "features.json").is_file():
        raise FileNotFoundError(
            f"name={name!r} is not prepared under data_dir={data_dir!r}; give its "
            "version, and prepare it with file_format='array_record' "
            "(dpjax.data.builders shows how)"
        )
    return tfds_folder(
        path=str(folder), split=split, features=features, in_memory=in_memory
    )


def tfds_folder(
    *, path: str, split: str, features: tuple[str, ...], in_memory: bool
) -> TfdsSource | ArraySource:
    """Open a prepared data set by its folder, as a config names it.

    Args:
        path: Folder of one version, such as "DATA_DIR/cifar10/3.0.2".
        split: See ``tfds_source``.
        features: See ``tfds_source``.
        in_memory: See ``tfds_source``; False for data larger than memory, whose records are
            read where they lie.

    Raises:
        FileNotFoundError: There is no data set in ``path``.
        ValueError: See ``tfds_source``.
    """
    import tensorflow_datasets as tfds

    if not pathlib.Path(path, "features.json").is_file():
        raise FileNotFoundError(
            f"path={path!r} holds no data set prepared by TFDS; give the folder of one "
            "version, prepared with file_format='array_record'"
        )
    builder = tfds.builder_from_directory(path)
    stored = builder.info.features
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{path} is prepared as {builder.info.file_format.value}, which has no random "
            "access; prepare it again with file_format='array_record'"
        )
    if not features or not set(features) <= set(stored):
        raise ValueError(f"features={features} must be among {sorted(stored)}")
    fields = {key: _field(key, stored[key]) for key in features}
    unread = {key: tfds.decode.SkipDecoding() for key in stored if key not in fields}
    # TFDS wraps this method in a decorator that hides its signature.
    records = builder.as_data_source(split, decoders=unread)  # pyrefly: ignore
    source = TfdsSource(records, fields)
    return source.load() if in_memory else source


def _field(key: str, feature: Any) -> Field:
    import tensorflow_datasets as tfds

    shape = feature.shape
    if not isinstance(shape, tuple) or None in shape:
        raise ValueError(f"feature {key!r} has no fixed shape: {feature}")
    dtype = np.dtype(feature.np_dtype)
    if dtype.kind not in "biuf":
        raise ValueError(f"feature {key!r} is not numeric: {feature}")
    is_image = isinstance(feature, tfds.features.Image)
    is_label = isinstance(feature, tfds.features.ClassLabel)
    return Field(
        shape=shape,
        dtype=np.dtype(np.int32) if is_label else dtype,
        is_pixels=is_image and dtype == np.uint8,
    )
