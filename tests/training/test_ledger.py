"""The same noise is never spent on two different sums."""

import pytest

from dpjax.training.ledger import Ledger, NoiseReuseError


def ledger_in(folder, layout="1x1", **kwargs):
    return Ledger(folder / "ledger", layout=layout, **kwargs)


def test_replaying_the_same_release_is_allowed(tmp_path):
    with ledger_in(tmp_path) as ledger:
        ledger.record(0, 11)
        ledger.record(0, 11)
        ledger.record(1, 12)


def test_another_sum_under_the_same_noise_is_refused(tmp_path):
    with ledger_in(tmp_path) as ledger:
        ledger.record(3, 11)
        with pytest.raises(NoiseReuseError, match="step 3 was released before"):
            ledger.record(3, 12)


def test_the_record_outlives_the_process(tmp_path):
    with ledger_in(tmp_path) as ledger:
        ledger.record(0, 11)
        ledger.record(1, 12)
    with ledger_in(tmp_path) as ledger:
        ledger.record(1, 12)
        ledger.record(2, 13)
    with ledger_in(tmp_path) as ledger, pytest.raises(NoiseReuseError):
        ledger.record(2, 14)


def test_a_line_torn_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "ledger"
    path.write_text("0 11 1x1\n1 1")
    with ledger_in(tmp_path) as ledger:
        ledger.record(1, 12)
    assert path.read_text() == "0 11 1x1\n1 12 1x1\n"


@pytest.mark.parametrize(
    "text", ["0 11 1x1\n1\n", "0 11 1x1\nx 3 1x1\n", "0 11 1x1\n0 12 1x1\n"]
)
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path / "ledger").write_text(text)
    with pytest.raises(NoiseReuseError, match="line 2"):
        ledger_in(tmp_path)


def test_missing_releases_are_noticed(tmp_path):
    with ledger_in(tmp_path) as ledger:
        for step in (0, 1, 3):
            ledger.record(step, 11)
        ledger.check_complete(2)
        for steps in (3, 4):
            with pytest.raises(NoiseReuseError, match="release of step 2"):
                ledger.check_complete(steps)


def test_two_processes_cannot_share_a_workdir(tmp_path):
    with ledger_in(tmp_path), pytest.raises(NoiseReuseError, match="in use"):
        ledger_in(tmp_path)


def test_a_run_that_lost_its_state_cannot_start_again(tmp_path):
    with ledger_in(tmp_path) as ledger:
        ledger.check_empty()
        ledger.record(0, 11)
    with (
        ledger_in(tmp_path) as ledger,
        pytest.raises(NoiseReuseError, match="no checkpoint"),
    ):
        ledger.check_empty()


def test_steps_are_replayed_only_where_they_were_released(tmp_path):
    with ledger_in(tmp_path) as ledger:
        for step in (0, 1, 2):
            ledger.record(step, 11)
    with ledger_in(tmp_path, "2x1") as ledger:
        with pytest.raises(NoiseReuseError, match="step 2 was released on 1x1, after"):
            ledger.check_layout(2)
        ledger.check_layout(3)
        ledger.record(3, 11)
    with ledger_in(tmp_path) as ledger, pytest.raises(NoiseReuseError, match="2x1"):
        ledger.check_layout(1 + 2)
    with ledger_in(tmp_path, "2x1") as ledger:
        ledger.check_layout(3)


def test_other_processes_refuse_the_same_and_write_nothing(tmp_path):
    with ledger_in(tmp_path) as ledger, ledger_in(tmp_path, writes=False) as other:
        for each in (ledger, other):
            each.record(0, 11)
            with pytest.raises(NoiseReuseError, match="step 0"):
                each.record(0, 12)
    assert (tmp_path / "ledger").read_text() == "0 11 1x1\n"
