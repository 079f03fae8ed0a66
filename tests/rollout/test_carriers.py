"""Rollouts are cut into scenes and put together again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from rlhf_drive.policies import DecodeTrace
from rlhf_drive.scenes import Trajectories
from rollout import Rollout


def make(scenes: int, group: int) -> Rollout:
    """Every number says which row it belongs to."""
    n, steps, length = scenes * group, 3, 2
    rows = torch.arange(n)
    cube = (100 * rows[None, :, None] + torch.arange(steps)[:, None, None] * 10).expand(steps, n, length)
    trace = DecodeTrace(
        cube, cube + 1, torch.ones(steps, n, length, dtype=torch.bool), torch.linspace(0, 1, steps), -cube.float(),
        1.0, 0, "all", 3, 7, cube[..., None].to(torch.int16),
    )  # fmt: skip
    poses = np.broadcast_to(np.arange(n, dtype=np.float64)[:, None, None], (n, 8, 3))
    names = tuple("abcdefgh"[:scenes])
    return Rollout(names, group, trace.tokens, trace, Trajectories(poses, np.repeat(np.arange(scenes), group)))


def test_groups_at_the_places_asked_for() -> None:
    rollout = make(5, 3)
    found = rollout.scenes(np.array([4, 0, 2]))
    rows = [12, 13, 14, 0, 1, 2, 6, 7, 8]
    assert found.scene_tokens == ("e", "a", "c")
    assert (len(found), found.num_generations) == (9, 3)
    assert torch.equal(found.tokens, rollout.tokens[rows])
    for name in ("state", "action", "scored", "logp", "experts"):
        assert torch.equal(getattr(found.trace, name), getattr(rollout.trace, name)[:, rows])
    assert torch.equal(found.trace.time, rollout.trace.time)
    assert found.trajectories.poses[:, 0, 0].tolist() == [float(row) for row in rows]
    assert found.trajectories.scene_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(rollout.scenes(np.array([], dtype=np.int64))) == 0


def test_parts_put_together_are_the_whole() -> None:
    rollout = make(5, 2)
    whole = Rollout.concatenate([rollout.scenes(np.array([0, 1])), rollout.scenes(np.array([2, 3, 4]))])
    assert whole.scene_tokens == rollout.scene_tokens
    assert torch.equal(whole.tokens, rollout.tokens)
    assert torch.equal(whole.trace.logp, rollout.trace.logp)
    np.testing.assert_array_equal(whole.trajectories.poses, rollout.trajectories.poses)
    np.testing.assert_array_equal(whole.trajectories.scene_index, rollout.trajectories.scene_index)


def test_routing_may_be_absent() -> None:
    rollout = make(2, 2)
    bare = replace(rollout, trace=replace(rollout.trace, experts=None))
    assert bare.scenes(np.array([1])).trace.experts is None
