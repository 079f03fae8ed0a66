"""Random numbers of a row depend on what the row is."""

from __future__ import annotations

import numpy as np

from rollout import row_uniforms


def test_rows_do_not_depend_on_their_batch() -> None:
    together = row_uniforms(1, 5, ["a", "b", "c"], 4, (2, 16))
    assert np.array_equal(together[4:8], row_uniforms(1, 5, ["b"], 4, (2, 16)))
    assert np.array_equal(together[4:6], row_uniforms(1, 5, ["b"], 2, (2, 16)))


def test_seed_step_scene_and_sample_all_matter() -> None:
    base = row_uniforms(1, 5, ["a"], 2, (4,))
    for other in (
        row_uniforms(2, 5, ["a"], 2, (4,)),
        row_uniforms(1, 6, ["a"], 2, (4,)),
        row_uniforms(1, 5, ["x"], 2, (4,)),
    ):
        assert not np.isclose(base, other).any()
    assert not np.isclose(base[0], base[1]).any()


def test_numbers_are_uniform() -> None:
    sample = row_uniforms(0, 0, [str(i) for i in range(500)], 4, (8,)).ravel()
    assert abs(sample.mean() - 0.5) < 0.01
    assert abs(sample.var() - 1 / 12) < 0.005
