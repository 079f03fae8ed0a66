"""Work of the main process that takes longer than processes wait for each other: scenes are made, planners compared."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from rlhf_drive.errors import TrainingError
from rlhf_drive.training.ranks import Ranks
from rlhf_drive.training.together import on_main

__all__ = ["on_main_for_long"]

T = TypeVar("T")

_BEAT_S = 20.0


def on_main_for_long(ranks: Ranks, function: Callable[[], T], *, beat_s: float = _BEAT_S) -> T:
    """As :func:`on_main`, however long `function` takes: meanwhile the main process tells the others that it lives.

    Args:
        ranks: The processes; all must call this. `function` must not use them.
        function: Runs on the main process; gives back a small plain value.
        beat_s: Most time between two signs of life; where processes wait for each other for a short time, a quarter of
            that.
    """
    if ranks.count == 1:
        return function()
    if not ranks.main:
        while ranks.first(True):
            pass
        return on_main(ranks, function)
    ended = threading.Event()
    lost: list[TrainingError] = []

    def beat() -> None:
        try:
            while not ended.wait(min(beat_s, ranks.timeout_s / 4)):
                ranks.first(True)
        except TrainingError as error:  # another process has ended; said when the work is done
            lost.append(error)

    thread = threading.Thread(target=beat, name="signs of life", daemon=True)
    thread.start()

    def finish() -> None:
        ended.set()
        thread.join()
        if lost:
            raise lost[0]
        ranks.first(False)

    try:
        result = function()
    except Exception as error:
        finish()
        failed = error

        def fail() -> T:
            raise failed

        return on_main(ranks, fail)
    except BaseException:  # the process is being ended: the others see that it is gone
        ended.set()
        raise
    finish()
    return on_main(ranks, lambda: result)
