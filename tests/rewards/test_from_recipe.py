"""Services as a recipe's `reward` section states them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rewards.from_recipe import build_service, reward_config
from rewards.pdm_closed import attach_references
from rlhf_drive.config import RewardSection, RewardTerm
from rlhf_drive.scenes import Trajectories
from rlhf_drive.scenes.generator import generate_scenes

HANGS = """
import threading
from pathlib import Path

def hangs(inputs):
    Path(__file__).with_name("called").touch()
    threading.Event().wait()
"""


def test_an_exception_does_not_wait_for_a_reward_that_hangs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HANGS)
    terms = (RewardTerm("pdms", 1.0), RewardTerm(f"{tmp_path / 'mine.py'}:hangs", 1.0))
    section = RewardSection("pdms", {}, (), terms, engine="local", workers=1, timeout_s=0.0, max_invalid_fraction=1.0)
    scene = next(attach_references(scene) for scene in generate_scenes(1, seed=0))
    plan = Trajectories(scene.reference.human_poses[None], np.zeros(1, dtype=np.int64))

    def submit_and_stop() -> None:
        with build_service(reward_config(section), section) as service:
            service.submit([scene], plan)
            deadline = time.monotonic() + 60.0
            while not (tmp_path / "called").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            raise KeyboardInterrupt

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            submit_and_stop()

    thread = threading.Thread(target=interrupted, daemon=True)
    thread.start()
    thread.join(90.0)
    assert (tmp_path / "called").exists()
    assert not thread.is_alive()
