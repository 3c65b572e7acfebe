import io
import sys

import pytest

from dpjax.training import opening, terminal
from tests.runs import tiny


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_what_is_private_is_told_on_a_terminal_only_and_marked(
    stream, private, monkeypatch
):
    out = stream()
    monkeypatch.setattr(sys, "stderr", out)
    terminal.tell(["3 rows are alike"], private=private)
    told = out.getvalue()
    assert ("3 rows" in told) == (stream is Terminal or not private)
    assert ("not to be published" in told) == (stream is Terminal and private)


def test_what_is_found_in_private_data_is_told_as_private(monkeypatch):
    told = []
    monkeypatch.setattr(
        terminal, "tell", lambda lines, *, private: told.append((lines, private))
    )
    for variant in ("dpsgd", "nonprivate"):
        opening.plan(tiny(variant))
    lines = ["no training example is repeated"]
    assert told == [(lines, True), (lines, False)]
