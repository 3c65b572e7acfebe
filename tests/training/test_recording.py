"""When the loop pauses, and how many steps it accounts then."""

import pytest

from dpjax.training.recording import Pause, pause_after

RUN = {"log_every": 3, "eval_every": 4, "checkpoint_every": 6}


@pytest.mark.parametrize(
    ("step", "last", "stop", "due"),
    [
        (3, 12, False, Pause(score=False, save=False, accounted=4)),
        (4, 12, False, Pause(score=True, save=False, accounted=4)),
        (5, 12, False, None),
        (5, 12, True, Pause(score=False, save=True, accounted=5)),
        (5, 5, False, Pause(score=True, save=True, accounted=5)),
        (6, 12, False, Pause(score=False, save=True, accounted=6)),
        (9, 10, False, Pause(score=False, save=False, accounted=10)),
    ],
)
def test_never_is_less_accounted_than_was_released(step, last, stop, due):
    assert pause_after(step, RUN, last=last, stop=stop) == due
