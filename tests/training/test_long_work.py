"""Processes wait for the main one as long as it lives, and hear what came of its work."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest
from oracles.process_runs import launch

from rlhf_drive.errors import ConfigError
from rlhf_drive.training.long_work import on_main_for_long
from rlhf_drive.training.ranks import Ranks

WAIT_S = 1.0


def slow(seconds: float) -> str:
    """Takes its time."""
    time.sleep(seconds)
    return f"after {seconds:g} s"


def wrong() -> str:
    """Fails, after a while."""
    time.sleep(0.3)
    raise ConfigError("nothing to compare")


def work(ranks: Ranks) -> list[str]:
    """Longer than processes wait, then at once, then an error."""
    impatient = Ranks(WAIT_S)
    found = [
        on_main_for_long(impatient, partial(slow, 3 * WAIT_S), beat_s=0.2),
        on_main_for_long(impatient, partial(slow, 0.0), beat_s=60.0),
        on_main_for_long(impatient, partial(slow, 3 * WAIT_S), beat_s=60.0),
    ]
    try:
        on_main_for_long(impatient, wrong, beat_s=0.1)
    except ConfigError as error:
        found.append(str(error))
    assert impatient.gather(ranks.index) == [0, 1]  # nobody is a call ahead
    return found


def test_the_others_wait_for_longer_than_they_would(tmp_path: Path) -> None:
    expected = ["after 3 s", "after 0 s", "after 3 s", "nothing to compare"]
    assert launch(work, tmp_path) == [expected, expected]


def test_one_process_does_it_and_nothing_else() -> None:
    assert on_main_for_long(Ranks(), lambda: 3) == 3
    with pytest.raises(ConfigError, match="nothing to compare"):
        on_main_for_long(Ranks(), wrong)
