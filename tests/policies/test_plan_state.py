"""How far a partly decoded plan lies from the anchor plan."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf_drive.policies import TrajectoryTokenizer
from rlhf_drive.policies.plan_state import plan_deviation, walk


@pytest.mark.parametrize("encoding", ["displacements", "waypoints"])
def test_walk_is_the_tokenizers_arithmetic(encoding: str) -> None:
    tokenizer = TrajectoryTokenizer(encoding, -40.0, 40.0, 0.1)
    t = 0.5 * np.arange(1, 9)
    plan = np.stack([6 * t - 0.4 * t**2, 0.5 * t**2, np.zeros(8)], axis=-1)[None]
    plan[0, 6:, :2] = plan[0, 5, :2]  # comes to a stop: no direction of travel there
    tokens = tokenizer.encode(plan)
    position, _ = walk(torch.from_numpy(tokenizer.values(tokens)).float(), encoding)
    assert position[0].numpy() == pytest.approx(tokenizer.decode(tokens)[0, :, :2], abs=1e-4)


def test_a_plan_on_the_anchor_does_not_deviate() -> None:
    anchor = torch.rand(2, 16) * 4
    assert plan_deviation(anchor.repeat_interleave(3, dim=0), anchor, "displacements").abs().max() < 1e-6


def test_deviation_is_known_only_after_the_step_that_made_it() -> None:
    anchor = torch.tensor([[5.0, 0.0] * 8])
    numbers = anchor.clone()
    numbers[0, 4], numbers[0, 5] = 7.0, 0.5  # third step: 2 m farther, 0.5 m to the left
    features = plan_deviation(numbers, anchor, "displacements")[0]
    assert features[:3].abs().max() == 0.0
    along, left, turn = features[3, 0] * 10, features[3, 2] * 2, features[3, 4] / 5
    assert along.item() == pytest.approx(2.0, abs=1e-5)
    assert left.item() == pytest.approx(0.5, abs=1e-5)
    # The direction of travel turned by atan(0.5 / 7); each later step of 5 m adds 5 sin of that to the left.
    assert turn.item() == pytest.approx(np.arctan2(0.5, 7.0), abs=1e-5)
    assert (features[4, 2] * 2).item() == pytest.approx(0.5 + 5 * np.sin(np.arctan2(0.5, 7.0)), abs=1e-5)
