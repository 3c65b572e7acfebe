import pytest

from dpjax.data.text import text_lines


def test_each_non_empty_line_is_truncated_or_padded(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("abcdef\n\nab\r\n\r\n é\nabcd".encode())
    source = text_lines(path=str(path), length=4)
    records = source[list(range(len(source)))]
    assert records["tokens"].tolist() == [
        list(b"abcd"),
        list(b"ab\0\0"),
        [32, 0xC3, 0xA9, 0],
        list(b"abcd"),
    ]
    assert records["mask"].sum(axis=1).tolist() == [4, 2, 3, 4]
    assert records["mask"][1].tolist() == [True, True, False, False]


def test_other_encodings_are_refused_with_the_line(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"one\ntwo\n" + "é".encode("latin-1") + b"\nfour")
    with pytest.raises(ValueError, match=f"{path}.*not UTF-8 in line 3"):
        text_lines(path=str(path), length=4)


def test_bad_arguments(tmp_path):
    path = tmp_path / "lines.txt"
    with pytest.raises(FileNotFoundError, match=str(path)):
        text_lines(path=str(path), length=4)
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="no non-empty line"):
        text_lines(path=str(path), length=4)
    with pytest.raises(ValueError, match="length=0"):
        text_lines(path=str(path), length=0)
