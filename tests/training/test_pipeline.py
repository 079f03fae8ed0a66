"""What the pipeline decides itself: which scenes a comparison may use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlhf_drive.config import Recipe
from rlhf_drive.errors import DataError
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.build import build_policy
from rlhf_drive.training.pipeline import _unseen


def test_scenes_that_a_policy_has_trained_on_are_left_out(
    tiny_recipe: Callable[..., Recipe], tiny_store: SceneStore, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = tiny_store.split("train")[:5]
    clean, learned = (build_policy(tiny_recipe(), torch.device("cpu")) for _ in range(2))
    learned.remember_training(scenes[1:3])
    assert _unseen(scenes, {"clean": clean}) == scenes
    assert _unseen(scenes, {"clean": clean, "learned": learned}) == [scenes[0], *scenes[3:]]
    assert "leaving out 2 of 5 held-out scenes that learned has trained on" in capsys.readouterr().out
    learned.remember_training(scenes)
    with pytest.raises(DataError, match="All 5 held-out scenes"):
        _unseen(scenes, {"learned": learned})
