import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from dpjax.data.tokenizers import byte_level, from_file, train_bpe

SPECIALS = ("<mask>", "<eos>")
PUBLIC = "the cat sat on the mat; the dog sat on the log — naïve\n" * 20


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "public.txt").write_text(PUBLIC)
    out = str(folder / "tokenizer.json")
    train_bpe(
        paths=(str(folder / "public.txt"),), vocab_size=300, specials=SPECIALS, out=out,
        provenance="public",
    )  # fmt: skip
    return from_file(path=out)


@pytest.fixture(params=["byte_level", "bpe"])
def tokenizer(request):
    if request.param == "bpe":
        return request.getfixturevalue("bpe")
    return byte_level(specials=SPECIALS)


@hypothesis.given(text=st.text(max_size=40) | st.just("a <mask> <eos> b"))
@hypothesis.settings(
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_any_text_comes_back_and_brings_in_no_special_token(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert not set(tokens) & set(tokenizer.specials.values())
    assert tokenizer.decode(tokens) == text


def test_special_tokens_are_distinct_and_decode_to_their_names(tokenizer):
    assert sorted(tokenizer.specials) == sorted(SPECIALS)
    for name, token in tokenizer.specials.items():
        assert 0 <= token < tokenizer.vocab_size
        assert tokenizer.decode([token]) == name
    assert len(set(tokenizer.specials.values())) == 2


def test_bpe_learns_the_words_of_its_texts(bpe):
    assert bpe.vocab_size <= 300
    assert len(bpe.encode(" the cat sat")) == 3
    assert len(bpe.encode(" qzx")) == 4


def test_a_tokenizer_is_learnt_from_public_text_only(tmp_path):
    options = {"paths": (), "specials": SPECIALS, "out": str(tmp_path / "t.json")}
    with pytest.raises(ValueError, match=r"provenance='private'.*is not private"):
        train_bpe(**options, vocab_size=300, provenance="private")
    with pytest.raises(ValueError, match="vocab_size=257 must be at least 258"):
        train_bpe(**options, vocab_size=257, provenance="public")


def test_files_that_are_no_tokenizer_are_explained(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match="is no file"):
        from_file(path=str(path))
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"is no tokenizer.json"):
        from_file(path=str(path))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'dpjax\[tokenizers\]'"):
        from_file(path=str(path))
