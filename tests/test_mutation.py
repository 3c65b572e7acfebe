"""The mutation run can fail: what changes nothing survives, what breaks is caught."""

import pytest

from tests.mutants import MUTANTS
from tests.mutation import ROOT, Mutant, outcome, run

TEST = "from code import answer\n\ndef test_answer():\n    assert answer == 42\n"


@pytest.mark.parametrize(
    ("old", "new", "caught", "told"),
    [
        (
            "answer = 42",
            "answer = 41",
            True,
            "caught by tests/test_code.py::test_answer",
        ),
        ("answer = 42", "answer = 42  # the same", False, "SURVIVED"),
        ("answer = 40", "answer = 41", False, "old text found 0 times"),
        ("2", "3", False, "old text found 2 times"),
    ],
)
def test_a_mutant_is_caught_by_a_test_that_fails_and_only_so(
    tmp_path, old, new, caught, told
):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_code.py").write_text(TEST)
    (tmp_path / "code.py").write_text("answer = 42  # or 2\n")
    text = (tmp_path / "code.py").read_text()
    found = run(Mutant("code", old, new, "test_code.py"), tmp_path)
    assert (found.caught, found.told) == (caught, told)
    assert (tmp_path / "code.py").read_text() == text


@pytest.mark.parametrize("status", [2, 3, 4, 5, None])
def test_tests_that_did_not_run_have_caught_nothing(status):
    assert not outcome(status, "ERROR tests/test_code.py").caught


def test_every_mutant_applies_to_the_code_as_it_is():
    assert len(MUTANTS) >= 120
    for mutant in MUTANTS:
        path = ROOT.joinpath(*mutant.module.split(".")).with_suffix(".py")
        assert path.read_text().count(mutant.old) == 1, mutant
        assert mutant.old != mutant.new, mutant
        for test in mutant.tests.split():
            file, _, name = test.partition("::")
            text = (ROOT / "tests" / file).read_text()
            assert not name or f"def {name.partition('[')[0]}(" in text, test
