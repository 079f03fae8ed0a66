"""What EPDMS does with plans and scenes that are broken or incomplete."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from oracles.tiny_epdms import COLUMNS, PLAN, prepared, reference
from oracles.tiny_scene import make_reference

from rewards.epdms import score_epdms
from rewards.prepare_epdms import prepare_epdms
from rlhf_drive.errors import DataError


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e308])
@pytest.mark.parametrize("of", ["plan", "previous plan"])
def test_a_row_that_is_not_finite_is_invalid_alone(value: float, of: str) -> None:
    plans, previous = np.repeat(PLAN, 3, axis=0), np.repeat(PLAN, 3, axis=0)
    (plans if of == "plan" else previous)[1, 3, 0] = value
    result = score_epdms(prepared(), plans, previous)
    assert result.valid.tolist() == [True, False, True]
    for name in COLUMNS:
        assert np.isnan(getattr(result, name)).tolist() == [False, True, False], name
        assert np.isnan(result.raw[name]).tolist() == [False, True, False], name
    assert np.isnan(result.ec_rms).any(axis=1).tolist() == [False, True, False]
    assert result.epdms[0] == result.epdms[2] == pytest.approx(1.0, abs=1e-9)


def test_no_plans_give_no_scores() -> None:
    nothing = np.zeros((0, 8, 3))
    assert score_epdms(prepared(), nothing, nothing).epdms.shape == (0,)


@pytest.mark.parametrize("shape", [(8, 3), (2, 7, 3), (2, 8, 2)])
def test_plans_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"^Plans must be \[B, 8, 3\]"):
        score_epdms(prepared(), np.zeros(shape))
    with pytest.raises(DataError, match=r"^Plans of the previous frame must be \[B, 8, 3\]"):
        score_epdms(prepared(), PLAN, np.zeros(shape))


def test_every_plan_needs_its_previous_one() -> None:
    with pytest.raises(DataError, match="got 1 plans and 2 previous ones"):
        score_epdms(prepared(), PLAN, np.repeat(PLAN, 2, axis=0))


def test_unknown_filter_settings_are_refused() -> None:
    with pytest.raises(DataError, match="human_filter must be 'on', 'off' or 'pre_2025_09_29'; got 'of'"):
        score_epdms(prepared(), PLAN, human_filter="of")


def test_a_scene_without_a_human_plan_is_scored_without_the_filter() -> None:
    scene = prepare_epdms(replace(reference(), human_poses=np.zeros((0, 3))))
    assert scene.human is None
    assert score_epdms(scene, PLAN, human_filter="off").epdms[0] == pytest.approx(1.0, abs=1e-9)
    for setting in ("on", "pre_2025_09_29"):
        with pytest.raises(DataError, match=r'needs SceneReference.human_poses.*human_filter="off"'):
            score_epdms(scene, PLAN, human_filter=setting)


def test_a_scene_without_a_previous_frame_is_scored_without_ec() -> None:
    scene = prepare_epdms(replace(reference(), prev_ego_init=np.zeros(0), prev_t0_us=0))
    assert scene.previous is None
    assert score_epdms(scene, PLAN).epdms[0] == pytest.approx(1.0, abs=1e-9)
    with pytest.raises(DataError, match=r"lacks SceneReference\.prev_ego_init"):
        score_epdms(scene, PLAN, PLAN)


@pytest.mark.parametrize("gap_us", [0, -500_000, 40_000, 550_000, 1_000_000])
def test_frames_too_far_apart_have_no_ec(gap_us: int) -> None:
    made = reference()
    scene = prepare_epdms(replace(made, prev_t0_us=made.t0_us - gap_us))
    assert score_epdms(scene, PLAN).epdms[0] == pytest.approx(1.0, abs=1e-9)
    with pytest.raises(DataError, match=rf"prev_t0_us lies {gap_us * 1e-6:g} s before t0_us"):
        score_epdms(scene, PLAN, PLAN)


def test_a_scene_without_a_progress_reference_is_refused() -> None:
    with pytest.raises(DataError, match=r"pdm_reference_v2 must be \[41, 3\].*attach_references"):
        prepare_epdms(make_reference())


def test_a_scene_without_a_past_is_refused() -> None:
    with pytest.raises(DataError, match=r"history comfort \(HC\).*past_states must be \[4, 11\]; got shape \[0, 11\]"):
        prepare_epdms(replace(reference(), past_states=np.zeros((0, 11)), past_times_us=np.zeros(0, dtype=np.int64)))
