"""The command of the tables: what it writes, and what it refuses."""

import json
import math

import pytest

from experiments.audits import tables as audit_tables


def test_a_suite_leaves_numbers_table_and_plot(tmp_path, monkeypatch):
    def suite(sources):
        return [
            {"data": name, "epsilon": e, "AUC, loss": 0.5, "AUC, LiRA": 0.51}
            for name in sources
            for e in (1.0, math.inf)
        ]

    monkeypatch.setitem(audit_tables.SUITES, "membership", suite)
    assert audit_tables.main([f"--out={tmp_path}", "--suite=membership"]) == 0
    rows = json.loads((tmp_path / "membership.json").read_text())
    assert rows == suite(["digits"])
    table = (tmp_path / "membership.md").read_text().splitlines()
    assert table[0] == "| data | epsilon | AUC, loss | AUC, LiRA |"
    assert table[3] == "| digits | inf | 0.5 | 0.51 |"
    assert (tmp_path / "membership.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--out=DIR is missing"),
        (["--out=a", "--suite=referees"], "did you mean 'referee'"),
        (["--out=a", "--mnist=absent.npz"], "absent.npz"),
    ],
)
def test_wrong_input_is_one_line(argv, message, capsys):
    assert audit_tables.main(argv) == 2
    assert message in capsys.readouterr().err
