"""The same noise is never spent on two different sums."""

import pytest

from dpjax.ledger import Ledger, NoiseReuseError


def test_replaying_the_same_release_is_allowed(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.record(0, 11)
        ledger.record(0, 11)
        ledger.record(1, 12)


def test_another_sum_under_the_same_noise_is_refused(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.record(3, 11)
        with pytest.raises(NoiseReuseError, match="step 3 was released before"):
            ledger.record(3, 12)


def test_the_record_outlives_the_process(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.record(0, 11)
        ledger.record(1, 12)
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.record(1, 12)
        ledger.record(2, 13)
    with Ledger(tmp_path / "ledger") as ledger, pytest.raises(NoiseReuseError):
        ledger.record(2, 14)


def test_a_line_torn_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "ledger"
    path.write_text("0 11\n1 1")
    with Ledger(path) as ledger:
        ledger.record(1, 12)
    assert path.read_text() == "0 11\n1 12\n"


@pytest.mark.parametrize("text", ["0 11\n1\n", "0 11\nx 3\n", "0 11\n0 12\n"])
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path / "ledger").write_text(text)
    with pytest.raises(NoiseReuseError, match="line 2"):
        Ledger(tmp_path / "ledger")


def test_missing_releases_are_noticed(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        for step in (0, 1, 3):
            ledger.record(step, 11)
        ledger.check_complete(2)
        with pytest.raises(NoiseReuseError, match="release of step 2"):
            ledger.check_complete(4)


def test_two_processes_cannot_share_a_workdir(tmp_path):
    with Ledger(tmp_path / "ledger"), pytest.raises(NoiseReuseError, match="in use"):
        Ledger(tmp_path / "ledger")


def test_a_run_that_lost_its_state_cannot_start_again(tmp_path):
    path = tmp_path / "ledger"
    with Ledger(path) as ledger:
        ledger.check_empty()
        ledger.record(0, 11)
    with Ledger(path) as ledger, pytest.raises(NoiseReuseError, match="no checkpoint"):
        ledger.check_empty()
