"""Text to tokens and back."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dpjax.checks import check_names, check_path


class Tokenizer(Protocol):
    """What the sources of text need of a tokenizer.

    It must not depend on the private texts: see ``train_bpe``.
    """

    @property
    def vocab_size(self) -> int:
        """Tokens are in [0, vocab_size)."""
        ...

    @property
    def specials(self) -> Mapping[str, int]:
        """Tokens that stand for no text, by name; only templates bring them in."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the tokens; a text that looks like a special token is mere text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text, special tokens as their names."""
        ...


@dataclasses.dataclass(frozen=True)
class ByteLevel:
    """The bytes of the text in UTF-8, 0 to 255, and special tokens from 256 on.

    Needs no file and learns nothing from data.

    Attributes:
        names: Of the special tokens.

    >>> tokenizer = ByteLevel(("<eos>",))
    >>> tokenizer.encode("é!")
    [195, 169, 33]
    >>> tokenizer.decode([195, 169, 33, 256]), tokenizer.vocab_size
    ('é!<eos>', 257)
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        check_names("specials", self.names)

    @property
    def vocab_size(self) -> int:
        """256 and the special tokens."""
        return 256 + len(self.names)

    @property
    def specials(self) -> Mapping[str, int]:
        """Special tokens by name."""
        return {name: 256 + i for i, name in enumerate(self.names)}

    def encode(self, text: str) -> list[int]:
        """Return the bytes of ``text``."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text; bytes that are no UTF-8 become U+FFFD."""
        parts = (
            self.names[token - 256].encode() if token >= 256 else bytes([token])
            for token in map(int, tokens)
        )
        return b"".join(parts).decode(errors="replace")


def byte_level(*, specials: Sequence[str]) -> ByteLevel:
    """Build the byte-level tokenizer with these special tokens."""
    check_names("specials", specials)
    return ByteLevel(tuple(specials))


@dataclasses.dataclass(frozen=True)
class _FromFile:
    inner: Any

    @property
    def vocab_size(self) -> int:
        return self.inner.get_vocab_size(with_added_tokens=True)

    @property
    def specials(self) -> Mapping[str, int]:
        added = self.inner.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self.inner.decode([*map(int, tokens)], skip_special_tokens=False)


def from_file(*, path: str) -> Tokenizer:
    """Load a ``tokenizer.json`` of the tokenizers library (the extra ``tokenizers``).

    Args:
        path: The file, as it lies beside the weights of pretrained models. Nothing is
            fetched.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the library is not installed or cannot read the file.
    """
    check_path("path", path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={path!r} is no file")
    library = _library(f"path={path!r}")
    try:
        inner = library.Tokenizer.from_file(path)
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"path={path!r} is no tokenizer.json: {error}") from error
    # Otherwise a text with "<mask>" in it would bring the token in.
    inner.encode_special_tokens = True
    return _FromFile(inner)


def train_bpe(
    *,
    paths: Sequence[str],
    vocab_size: int,
    specials: Sequence[str],
    out: str,
    provenance: str,
) -> None:
    """Learn a byte-level BPE from PUBLIC text files and write its ``tokenizer.json``.

    This is not private: the vocabulary spells out pieces of the texts, and which pieces
    are in it tells how often they occur. Nothing here adds noise, so a tokenizer learnt
    from private texts publishes them, whatever the training after it does.

    Args:
        paths: Text files.
        vocab_size: At most as many tokens; at least 256 and the special ones.
        specials: Names of special tokens, first in the vocabulary.
        out: File to write.
        provenance: "public", said in so many words.

    Raises:
        ValueError: If the texts are not public or not there, the vocabulary is too small,
            or the library (the extra ``tokenizers``) is not installed.

    References:
        Sennrich et al., Neural Machine Translation of Rare Words with Subword Units,
        https://arxiv.org/abs/1508.07909
    """
    if provenance != "public":
        raise ValueError(
            f"{provenance=}: a tokenizer learnt from private texts is not private; learn it "
            "from public ones (provenance='public'), or use byte_level, which learns nothing"
        )
    check_names("specials", specials)
    if vocab_size < 256 + len(specials):
        raise ValueError(
            f"{vocab_size=} must be at least {256 + len(specials)}: every byte, and "
            f"{len(specials)} special tokens"
        )
    check_names("paths", paths)
    if not paths or not all(Path(path).is_file() for path in paths):
        raise ValueError(f"paths={paths!r} must be text files that are there")
    if not Path(out).absolute().parent.is_dir():
        raise ValueError(f"{out=} is in a folder that does not exist")
    library = _library("train_bpe")
    tokenizer = library.Tokenizer(library.models.BPE())
    level = library.pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*specials],
        initial_alphabet=level.alphabet(),
        show_progress=False,
    )
    tokenizer.train([*paths], trainer)
    tokenizer.save(out)


def _library(what: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            f"{what} needs the tokenizers library: pip install 'dpjax[tokenizers]'"
        ) from None
    return tokenizers
