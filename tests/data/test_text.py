import pytest

from dpjax.data.text import labelled_texts, text_blocks, text_lines, text_pairs
from dpjax.data.tokenizers import byte_level

BYTES = byte_level(specials=("<mask>", "<eos>"))
MASK, EOS = 256, 257


def records_of(source):
    return source[list(range(len(source)))]


def texts_of(source):
    records = records_of(source)
    return [
        BYTES.decode(tokens[mask])
        for tokens, mask in zip(records["tokens"], records["mask"], strict=True)
    ]


def test_each_non_empty_line_is_truncated_or_padded(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("abcdef\n\nab\r\n\r\n é\na\x0bcd".encode())
    records = records_of(text_lines(path=str(path), length=4, tokenizer=BYTES))
    assert records["tokens"].tolist() == [
        list(b"abcd"),
        list(b"ab\0\0"),
        [32, 0xC3, 0xA9, 0],
        list(b"a\x0bcd"),
    ]
    assert records["mask"].sum(axis=1).tolist() == [4, 2, 3, 4]
    assert records["mask"][1].tolist() == [True, True, False, False]


def test_blocks_are_the_text_in_order_and_parts_do_not_overlap(tmp_path):
    path = tmp_path / "text.txt"
    text = "In the beginning\nwas é word."
    path.write_text(text)

    def texts(start, stop):
        source = text_blocks(
            path=str(path), length=5, tokenizer=BYTES, start=start, stop=stop
        )
        records = records_of(source)
        return [
            bytes(tokens[mask].tolist())
            for tokens, mask in zip(records["tokens"], records["mask"], strict=True)
        ]

    whole = texts(0.0, 1.0)
    assert b"".join(whole) == text.encode()
    assert {len(block) for block in whole[:-1]} == {5}
    assert texts(0.0, 0.55) + texts(0.55, 1.0) == whole
    assert len(texts(0.0, 0.5)) == round(0.5 * len(whole))


def sst2(path, template, length):
    return labelled_texts(
        path=str(path), delimiter="\t", columns=("sentence", "label"),
        template=template, label="label", length=length, tokenizer=BYTES,
    )  # fmt: skip


def test_labelled_texts_fill_their_template(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text('a "fine\t1\nnot <eos> so\t0\n')
    source = sst2(path, ("{sentence}", " It was ", "<mask>", "."), 30)
    # A text that looks like a special token is text.
    assert texts_of(source) == [
        'a "fine It was <mask>.',
        "not <eos> so It was <mask>.",
    ]
    records = records_of(source)
    assert (records["tokens"] == MASK).sum(axis=1).tolist() == [1, 1]
    assert not (records["tokens"] == EOS).any()
    assert records["label"].tolist() == [1, 0]


def test_where_a_row_is_too_long_the_longest_column_is_cut_not_the_template(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("abcdefghij\t1\nabc\t0\n")
    source = sst2(path, ("{sentence}", "<mask>", "."), 6)
    assert texts_of(source) == ["abcd<mask>.", "abc<mask>."]
    with pytest.raises(ValueError, match="length=1 is too short for template="):
        sst2(path, ("{sentence}", "<mask>", "."), 1)


def e2e(path, length=40, **changes):
    options = {
        "delimiter": ",", "columns": (), "template": ("{mr}", "|", "{ref}", "<eos>"),
        "target": 2, "tokenizer": BYTES,
    }  # fmt: skip
    return text_pairs(path=str(path), length=length, **options | changes)


def test_pairs_weigh_the_answer_and_its_end(tmp_path):
    path = tmp_path / "dev.csv"
    path.write_text('mr,ref\n"name[A], near[B]","A, ""by"" B."\nx,"two\nlines"\n')
    source = e2e(path)
    assert texts_of(source) == ['name[A], near[B]|A, "by" B.<eos>', "x|two\nlines<eos>"]
    records = records_of(source)
    answers = [
        BYTES.decode(tokens[weights > 0])
        for tokens, weights in zip(records["tokens"], records["weights"], strict=True)
    ]
    assert answers == ['A, "by" B.<eos>', "two\nlines<eos>"]
    assert set(records["weights"].ravel().tolist()) == {0.0, 1.0}


def test_long_pairs_lose_from_their_longer_side_first(tmp_path):
    path = tmp_path / "dev.csv"
    path.write_text("mr,ref\nabcdefgh,ABCD\nabcd,ABCDEFGH\n")
    assert texts_of(e2e(path, 10)) == ["abcd|ABCD<eos>", "abcd|ABCD<eos>"]
    assert texts_of(e2e(path, 7)) == ["ab|ABC<eos>", "ab|ABC<eos>"]


def test_other_encodings_are_refused_with_the_line(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"one\ntwo\n" + "é".encode("latin-1") + b"\nfour")
    with pytest.raises(ValueError, match=f"{path}.*not UTF-8 in line 3"):
        text_lines(path=str(path), length=4, tokenizer=BYTES)


def test_bad_files_and_arguments(tmp_path):
    path = tmp_path / "lines.txt"
    options = {"path": str(path), "length": 4, "tokenizer": BYTES}
    with pytest.raises(FileNotFoundError, match=str(path)):
        text_lines(**options)
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="no non-empty line"):
        text_lines(**options)
    with pytest.raises(ValueError, match="length=0"):
        text_lines(**options | {"length": 0})
    with pytest.raises(ValueError, match=r"start=0.5 and stop=0.5"):
        text_blocks(**options, start=0.5, stop=0.5)
    with pytest.raises(ValueError, match=r"1 blocks of length=4, none from start=0.6"):
        text_blocks(**options, start=0.6, stop=0.9)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("mr,ref\n", {}, "has no rows"),
        (
            "mr,answer\nx,y\n",
            {},
            r"no column \['ref'\] among the 2 names of its first l",
        ),
        (
            "x,y\n",
            {"columns": ("mr", "a")},
            r"\['ref'\] among the columns=\('mr', 'a'\)",
        ),
        ("mr,ref\nx,y\nx,y,z\n", {}, "row 2 has 3 columns, not 2"),
        (
            "mr,ref\nx,y\n",
            {"template": ("{mr}", "[SEP]", "{ref}")},
            r"'\[SEP\]' of template=.* has \['<mask>', '<eos>'\]",
        ),
        ("mr,ref\nx,y\n", {"target": 4}, "target=4 must be the number of a piece"),
    ],
)
def test_tables_that_do_not_fit_are_explained(tmp_path, text, changes, message):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        e2e(path, **changes)


def test_a_label_that_is_no_integer_is_refused(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("fine\t1\nbad\tnegative\n")
    with pytest.raises(
        ValueError, match=r"column label of row 2 is no integer of at most 9 digits$"
    ):
        sst2(path, ("{sentence}",), 8)


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "dev.csv"
    path.write_text("mr,ref\nx,y\n", encoding="utf-8-sig")
    assert texts_of(e2e(path)) == ["x|y<eos>"]
    path.write_text("é\n", encoding="utf-8-sig")
    assert texts_of(text_lines(path=str(path), length=4, tokenizer=BYTES)) == ["é"]


def test_errors_of_tables_without_a_header_tell_no_row(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("Ann is ill,9\nBo,8,7\n")
    for template in (("{mr}",), ("|",)):  # the second needs no column, and reads on
        with pytest.raises(ValueError, match=r"no column|row 1 has 3") as caught:
            e2e(path, template=template, target=0)
        assert "Ann" not in str(caught.value)
