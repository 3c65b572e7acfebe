"""Text as records of a fixed number of tokens: lines, blocks, rows of tables.

One record is one unit of privacy: no text is joined or split over records. A record that
is shorter than ``length`` tokens is padded at its end with token 0 and ``mask`` False.
"""

import csv
import io
import itertools
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from dpjax.checks import check_number, check_path, check_positive_int
from dpjax.data.arrays import ArraySource
from dpjax.data.tokenizers import Tokenizer


def text_lines(*, path: str, length: int, tokenizer: Tokenizer) -> ArraySource:
    """Read a UTF-8 file; each non-empty line is one record.

    Args:
        path: Text file.
        length: Number of tokens T of each record; a longer line loses its end.
        tokenizer: As of ``dpjax.data.tokenizers``.

    Returns:
        A source of ``tokens`` int32 [T] and ``mask`` bool [T].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If ``length`` is not positive, or the file is not UTF-8 or empty.
    """
    _check_length(length)
    _check_tokenizer(tokenizer)
    # Not str.splitlines, which also splits at characters within a line.
    lines = [line for line in re.split(r"\r\n|\r|\n", _read(path)) if line]
    if not lines:
        raise ValueError(f"path={path!r} has no non-empty line")
    return ArraySource(
        _padded([tokenizer.encode(line)[:length] for line in lines], length)
    )


def text_blocks(
    *, path: str, length: int, tokenizer: Tokenizer, start: float, stop: float
) -> ArraySource:
    """Read a UTF-8 file as one text, cut into blocks of ``length`` tokens.

    The guarantee is for one block: what one author wrote may be in many.

    Args:
        path: Text file.
        length: Number of tokens T of each record; the last block may be shorter.
        tokenizer: As of ``dpjax.data.tokenizers``.
        start: Where the records begin, as a fraction of the blocks: 0 is the first.
        stop: Where they end, likewise: 1 is after the last.

    Returns:
        A source of ``tokens`` int32 [T] and ``mask`` bool [T].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If ``length`` is not positive, the fractions are out of order or leave
            no block, or the file is not UTF-8.
    """
    _check_length(length)
    _check_tokenizer(tokenizer)
    check_number("start", start)
    check_number("stop", stop)
    if not 0.0 <= start < stop <= 1.0:
        raise ValueError(f"{start=} and {stop=} must be ordered fractions in [0, 1]")
    tokens = tokenizer.encode(_read(path))
    blocks = [tokens[i : i + length] for i in range(0, len(tokens), length)]
    chosen = blocks[round(start * len(blocks)) : round(stop * len(blocks))]
    if not chosen:
        raise ValueError(
            f"path={path!r} has {len(blocks)} blocks of {length=}, none from {start=} to "
            f"{stop=}"
        )
    return ArraySource(_padded(chosen, length))


def labelled_texts(
    *,
    path: str,
    delimiter: str,
    columns: Sequence[str],
    template: Sequence[str],
    label: str,
    length: int,
    tokenizer: Tokenizer,
) -> ArraySource:
    r"""Read a table of texts with labels; each row is one record.

    Args:
        path: UTF-8 file with one row a line. With ``delimiter="\t"`` quotes are ordinary
            characters; otherwise it is CSV.
        delimiter: Between the columns.
        columns: Names of the columns, if the file has no header; () if it has one.
        template: Pieces of a record, encoded one by one and joined: "{COLUMN}" is a text
            of the row, the name of a special token is that token (what looks like one,
            "<mask>" or "[MASK]", must be one), anything else is itself. For infilling:
            ("<s>", "{sentence}", " It was", "<mask>", "</s>").
        label: Column of integers.
        length: Number of tokens T of each record. Where a row is too long, its longest
            column loses its end; the rest of the template stays.
        tokenizer: As of ``dpjax.data.tokenizers``.

    Returns:
        A source of ``tokens`` int32 [T], ``mask`` bool [T] and ``label`` int32 [].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a row or the template does not fit the columns, a label is no
            integer, or the template alone is longer than ``length``.
    """
    _check_template(template, tokenizer)
    rows = _table(path, delimiter, columns, needed=(*_fields(template), label))
    pieces = [_pieces(row, template, length, tokenizer) for row in rows]
    labels = []
    for number, row in enumerate(rows, start=1):
        value = row[label].strip()
        if not re.fullmatch(r"-?\d{1,9}", value):
            raise ValueError(
                f"path={path!r}: column {label} of row {number} is no integer of at most 9 "
                "digits"
            )
        labels.append(int(value))
    return ArraySource(
        _padded([_joined(p) for p in pieces], length)
        | {"label": np.array(labels, np.int32)}
    )


def text_pairs(
    *,
    path: str,
    delimiter: str,
    columns: Sequence[str],
    template: Sequence[str],
    target: int,
    length: int,
    tokenizer: Tokenizer,
) -> ArraySource:
    r"""Read a table of prompts and answers; each row is one record.

    Args:
        path: As for ``labelled_texts``.
        delimiter: Likewise.
        columns: Likewise.
        template: Likewise. For E2E: ("{mr}", "\n", "{ref}", "<eos>").
        target: The number of the first piece that is to be predicted, counted from 0:
            2 for that template. What is before it is only read.
        length: As for ``labelled_texts``.
        tokenizer: Likewise.

    Returns:
        A source of ``tokens`` int32 [T], ``mask`` bool [T], and ``weights`` float32 [T],
        1 on the tokens to be predicted, 0 elsewhere.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a row or the template does not fit the columns, the template alone
            is longer than ``length``, or there is no piece ``target``.
    """
    _check_template(template, tokenizer)
    if not isinstance(target, int) or not 0 <= target < len(template):
        raise ValueError(
            f"{target=} must be the number of a piece of template={tuple(template)}"
        )
    rows = _table(path, delimiter, columns, needed=_fields(template))
    pieces = [_pieces(row, template, length, tokenizer) for row in rows]
    arrays = _padded([_joined(p) for p in pieces], length)
    first = np.array([sum(map(len, p[:target])) for p in pieces])
    answer = (np.arange(length)[None] >= first[:, None]) & arrays["mask"]
    return ArraySource(arrays | {"weights": answer.astype(np.float32)})


def _read(path: str) -> str:
    check_path("path", path)
    text = pathlib.Path(path).read_bytes()
    try:
        return text.decode("utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
        raise ValueError(
            f"path={path!r} is not UTF-8 in line {line}: {error}"
        ) from None


def _table(
    path: str, delimiter: str, columns: Sequence[str], *, needed: Sequence[str]
) -> list[dict[str, str]]:
    if not isinstance(delimiter, str) or len(delimiter) != 1:
        raise ValueError(f"{delimiter=} must be one character")
    lines = io.StringIO(_read(path), newline="")  # csv's own reading of line ends
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    rows = _rows(csv.reader(lines, delimiter=delimiter, quoting=quoting), path)
    names = [*columns] or next(rows, [])
    missing = sorted(set(needed) - set(names))
    if missing:
        # Not what the line says: without a header it is a private row.
        found = f"{columns=}" if columns else f"{len(names)} names of its first line"
        raise ValueError(
            f"path={path!r} has no column {missing} among the {found}; if the file has no "
            "header, name its columns in columns=(...)"
        )
    if len({*names}) < len(names):
        found = f"{columns=}" if columns else "its first line"
        raise ValueError(f"path={path!r}: {found} has a name twice; rename one")
    table = []
    for number, row in enumerate((row for row in rows if row), start=1):
        if len(row) != len(names):
            raise ValueError(
                f"path={path!r}: row {number} has {len(row)} columns, not {len(names)}; "
                f"check {delimiter=} and quotes"
            )
        table.append(dict(zip(names, row, strict=True)))
    if not table:
        raise ValueError(f"path={path!r} has no rows")
    return table


def _rows(reader: Iterator[list[str]], path: str) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(
            f"path={path!r}: {error}; check delimiter and quotes"
        ) from error


def _fields(template: Sequence[str]) -> list[str]:
    return [piece[1:-1] for piece in template if _is_field(piece)]


def _is_field(piece: str) -> bool:
    return piece.startswith("{") and piece.endswith("}")


def _check_template(template: Sequence[str], tokenizer: Tokenizer) -> None:
    """Refuse the name of a special token of another tokenizer: it would be mere text."""
    _check_tokenizer(tokenizer)
    strings = not isinstance(template, str) and all(
        isinstance(p, str) for p in template
    )
    if not strings or not template:
        raise ValueError(f"{template=} must be a tuple of pieces, each a string")
    for piece in template:
        if re.fullmatch(r"<[^<>\s]+>|\[[A-Z]+\]", piece) and (
            piece not in tokenizer.specials
        ):
            raise ValueError(
                f"{piece!r} of template={tuple(template)} is no special token of the "
                f"tokenizer, which has {[*tokenizer.specials]}"
            )


def _pieces(
    row: dict[str, str], template: Sequence[str], length: int, tokenizer: Tokenizer
) -> list[list[int]]:
    """Return the tokens of each piece, at most ``length`` in all."""
    specials = tokenizer.specials
    pieces = []
    for piece in template:
        if _is_field(piece):
            pieces.append(tokenizer.encode(row[piece[1:-1]]))
        else:
            given = specials.get(piece)
            pieces.append(tokenizer.encode(piece) if given is None else [given])
    texts = [tokens for p, tokens in zip(template, pieces, strict=True) if _is_field(p)]
    surplus = sum(map(len, pieces)) - length
    if surplus > sum(map(len, texts)):
        raise ValueError(f"{length=} is too short for template={tuple(template)} alone")
    while surplus > 0:
        longest = max(texts, key=len)
        rest = sorted(map(len, texts))[-2] if len(texts) > 1 else 0
        cut = min(surplus, max(1, len(longest) - rest))
        del longest[len(longest) - cut :]
        surplus -= cut
    return pieces


def _joined(pieces: Sequence[list[int]]) -> list[int]:
    return [*itertools.chain.from_iterable(pieces)]


def _padded(records: Sequence[list[int]], length: int) -> dict[str, np.ndarray]:
    _check_length(length)
    tokens = np.zeros((len(records), length), np.int32)
    mask = np.zeros((len(records), length), bool)
    for i, record in enumerate(records):
        tokens[i, : len(record)] = record
        mask[i, : len(record)] = True
    return {"tokens": tokens, "mask": mask}


def _check_length(length: int) -> None:
    check_positive_int("length", length)


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    if not hasattr(tokenizer, "specials"):
        raise ValueError(
            f"{tokenizer=} must be a tokenizer, such as dpjax.data.tokenizers.byte_level(...)"
        )
