import numpy as np
import pytest
from PIL import Image

CLASSES = ("bird", "cat", "dog")
PER_CLASS = 5


@pytest.fixture(scope="session")
def image_root(tmp_path_factory):
    """Random 6x4 RGB images in ``<root>/{train,test}/<class>/<i>.png``."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(PER_CLASS):
                pixels = rng.integers(256, size=(6, 4, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def tfds_dir(image_root, tmp_path_factory):
    """The images of ``image_root``, prepared as ``image_archive/tiny:1.0.0``."""
    import tarfile

    from dpjax.data.builders import image_archive

    folder = tmp_path_factory.mktemp("tfds")
    with tarfile.open(folder / "tiny.tar.gz", "w:gz") as archive:
        archive.add(image_root, arcname="tiny")
    arguments = ["--archive", str(folder / "tiny.tar.gz"), "--name", "tiny"]
    image_archive.main([*arguments, "--data_dir", str(folder)])
    return folder
