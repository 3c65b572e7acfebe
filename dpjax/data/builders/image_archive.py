r"""Prepare a tar archive of an image folder as a TFDS data set, without TensorFlow.

The archive holds ``<split>/<class>/<name>.{jpg,jpeg,png}``, all images of one size:

    python -m dpjax.data.builders.image_archive --archive=cifar10.tar.xz \
        --name=cifar10 --data_dir=$HOME/tensorflow_datasets

Then ``tfds_source(name="image_archive/cifar10:1.0.0", ...)`` reads it.
"""

import argparse
import dataclasses
import io
import pathlib
import tarfile
from collections.abc import Iterator

import tensorflow_datasets as tfds

from dpjax.data.images import SUFFIXES, check_shape, decode_image


@dataclasses.dataclass
class ArchiveConfig(tfds.core.BuilderConfig):
    """What must be known of an archive before its images are read."""

    archive: str = ""
    splits: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()


class ImageArchive(tfds.core.GeneratorBasedBuilder):
    """Images and labels from a tar archive in ``manual_dir``."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Pass the archive to this module's command line."

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=self.builder_config.shape),
            "label": tfds.features.ClassLabel(names=self.builder_config.classes),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        config = self.builder_config
        path = pathlib.Path(dl_manager.manual_dir) / config.archive
        return {split: self._generate_examples(path, split) for split in config.splits}

    def _generate_examples(self, path: pathlib.Path, split: str) -> Iterator[tuple]:
        for name, data in _images(path):
            found_split, label, _ = name.parts[-3:]
            if found_split != split:
                continue
            image = decode_image(io.BytesIO(data), name=str(name))
            check_shape(image, self.builder_config.shape, name=str(name))
            yield str(name), {"image": data, "label": label}  # arrays would need TF


def _images(path: pathlib.Path) -> Iterator[tuple[pathlib.PurePosixPath, bytes]]:
    """Yield the name and the bytes of every image, in the order of the archive."""
    with tarfile.open(path) as archive:
        for member in archive:
            name = pathlib.PurePosixPath(member.name)
            file = archive.extractfile(member)  # None for a folder
            if file and name.suffix.lower() in SUFFIXES:
                yield name, file.read()


def describe(path: pathlib.Path, *, name: str) -> ArchiveConfig:
    """Read the splits, the classes and the shape of the first image of an archive."""
    shape, splits, classes = None, set(), set()
    for file, data in _images(path):
        if len(file.parts) < 3:
            raise ValueError(f"{path}: {file} is not <split>/<class>/<name>")
        splits.add(file.parts[-3])
        classes.add(file.parts[-2])
        if shape is None:
            shape = decode_image(io.BytesIO(data), name=str(file)).shape
    if shape is None:
        raise ValueError(f"{path} has no {', '.join(SUFFIXES)} files")
    return ArchiveConfig(
        name=name,  # pyrefly: ignore[unexpected-keyword]
        archive=path.name,
        splits=tuple(sorted(splits)),
        classes=tuple(sorted(classes)),
        shape=shape,
    )


def main(argv: list[str] | None = None) -> None:
    """Prepare the archive given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", required=True, help="tar file, compressed or not")
    parser.add_argument("--name", required=True, help="a name for the data set")
    parser.add_argument("--data_dir", required=True, help="where TFDS keeps data sets")
    args = parser.parse_args(argv)
    path = pathlib.Path(args.archive)
    builder = ImageArchive(
        config=describe(path, name=args.name),
        data_dir=args.data_dir,
        file_format="array_record",  # the one with random access
    )
    if builder.data_path.exists():  # TFDS would keep the old data without a word
        raise FileExistsError(f"{builder.data_path} exists; remove it or change --name")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            manual_dir=path.parent, try_download_gcs=False
        )
    )


if __name__ == "__main__":
    main()
