"""Scene order and learning rate are functions of the step, checked by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rlhf_drive.training.schedule import epoch_order, learning_rate_scale, scene_order


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (7, 3), (5, 5), (3, 8), (1, 2), (38, 16)])
def test_every_scene_is_visited_once_an_epoch(count: int, batch: int) -> None:
    epochs = 4
    steps = math.ceil(epochs * count / batch)
    visits = [i for step in range(steps) for i in scene_order(5, step, count, batch)]
    assert len(visits) == steps * batch
    for epoch in range(epochs):
        assert sorted(visits[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_have_different_orders() -> None:
    epochs = [tuple(scene_order(0, epoch, 20, 20)) for epoch in range(6)]
    assert len(set(epochs)) == 6
    assert tuple(range(20)) not in epochs


def test_order_is_a_function_of_seed_and_step() -> None:
    steps = {step: scene_order(3, step, 11, 4) for step in range(9)}
    assert {step: scene_order(3, step, 11, 4) for step in reversed(range(9))} == steps
    assert [scene_order(4, step, 11, 4) for step in range(9)] != list(steps.values())
    # The stream of visits does not depend on how it is cut into steps.
    assert [i for step in range(6) for i in steps[step]] == [
        i for step in range(3) for i in scene_order(3, step, 11, 8)
    ]


def plain_order(seed: int, step: int, count: int, batch: int) -> list[int]:
    """Each position of the endless stream of visits on its own, with a permutation of its own."""
    order = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, offset = divmod(position, count)
        order.append(int(np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)[offset]))
    return order


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (1, 3), (7, 3), (38, 16), (5, 12), (300, 32)])
def test_kept_permutations_change_no_order(count: int, batch: int) -> None:
    for seed in (0, 12345):
        for step in (0, 1, 5, 2, 40, 3, 41, 0):  # more epochs than are kept, back and forth
            assert scene_order(seed, step, count, batch) == plain_order(seed, step, count, batch)


def test_an_order_cannot_be_changed_by_accident_and_is_compact() -> None:
    order = epoch_order(0, 0, 1000)
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1
    assert order.nbytes == 4000
    assert epoch_order(0, 0, 1000) is order
    assert epoch_order.cache_info().maxsize == 4


def test_learning_rate_by_hand() -> None:
    # 20 steps, 0.2 of them warming up: 4 steps rise by quarters. Then half a cosine over the other 16, which ends
    # one step before zero: progress p = (step - 4) / 16, scale = (1 + cos(pi p)) / 2.
    scale = [learning_rate_scale(step, 20, 0.2) for step in range(20)]
    assert scale[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert scale[8] == pytest.approx((1 + math.sqrt(0.5)) / 2, abs=1e-15)
    assert scale[12] == pytest.approx(0.5, abs=1e-15)
    assert scale[16] == pytest.approx((1 - math.sqrt(0.5)) / 2, abs=1e-15)
    assert scale[19] == pytest.approx((1 - math.cos(math.pi / 16)) / 2, abs=1e-15)
    assert all(a > b for a, b in itertools.pairwise(scale[4:]))
    assert learning_rate_scale(20, 20, 0.2) == learning_rate_scale(30, 20, 0.2) == 0.0


def test_learning_rate_at_the_edges() -> None:
    assert learning_rate_scale(0, 10, 0.0) == 1.0  # no warm-up
    assert learning_rate_scale(0, 1, 0.0) == 1.0  # a run of a single step learns
    assert learning_rate_scale(0, 1, 0.05) == 1.0
    assert [learning_rate_scale(step, 10, 0.15) for step in range(3)] == [0.5, 1.0, 1.0]  # 1.5 steps count as two
    assert [learning_rate_scale(step, 4, 1.0) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]  # warm-up all along
