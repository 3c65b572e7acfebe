"""Lines of text as fixed-length byte sequences."""

import pathlib

import numpy as np

from dpjax.data.arrays import ArraySource


def text_lines(*, path: str, length: int) -> ArraySource:
    """Read a UTF-8 file; each non-empty line is one record, of bytes.

    One line is one unit of privacy, so records are never joined or split over lines:
    a line longer than ``length`` bytes loses its end, a shorter one is padded with 0.

    Args:
        path: Text file.
        length: Number of bytes T of each record.

    Returns:
        A source of ``tokens`` int32 [T], byte values 0 to 255, and ``mask`` bool [T],
        False on the padding.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If ``length`` is not positive, or the file is not UTF-8 or empty.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1")
    text = pathlib.Path(path).read_bytes()
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
        raise ValueError(
            f"path={path!r} is not UTF-8 in line {line}: {error}"
        ) from None
    lines = [line[:length] for line in text.splitlines() if line]
    if not lines:
        raise ValueError(f"path={path!r} has no non-empty line")
    lengths = np.array([len(line) for line in lines])
    padded = b"".join(line.ljust(length, b"\0") for line in lines)
    tokens = np.frombuffer(padded, np.uint8).reshape(len(lines), length)
    return ArraySource(
        {
            "tokens": tokens.astype(np.int32),
            "mask": np.arange(length)[None, :] < lengths[:, None],
        }
    )
