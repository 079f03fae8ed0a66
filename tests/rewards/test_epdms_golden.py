"""EPDMS against the official values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rewards.epdms import EpdmsResult, combine_epdms, prepare_epdms, score_epdms
from rewards.prepare_epdms import PreparedEpdms
from rlhf_drive.scenes.importers.vectors import VectorScene, read_vectors

DISCRETE = ("nc", "dac", "tlc", "ddc", "ttc", "lk", "hc")
HUMAN = ("nc", "dac", "ddc", "tlc", "ttc", "lk")
Golden = dict[str, np.ndarray]
Case = tuple[VectorScene, Golden, PreparedEpdms]


def read_cases(folder: Path) -> list[Case]:
    cases = []
    for scene in read_vectors(folder):
        with np.load(folder / f"{scene.name}.golden.npz", allow_pickle=False) as archive:
            golden = {name: archive[name] for name in archive.files if name.startswith("v2_")}
        cases.append((scene, golden, prepare_epdms(scene.reference)))
    return cases


@pytest.fixture(scope="module")
def cases(navsim_golden: Path) -> list[Case]:
    return read_cases(navsim_golden / "golden")


@pytest.fixture(scope="module")
def recorded_cases(recorded_scenes: Path) -> list[Case]:
    folder = recorded_scenes / "golden"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return read_cases(folder)


def tolerance(scene: VectorScene) -> np.ndarray:
    """``[B]`` how far a score may be off: rounding alone moves plans that stand still."""
    return np.where([tag == "stand_still" for tag in scene.tags], 1e-3, 1e-6)


def score(case: Case, *, human_filter: str = "on") -> EpdmsResult:
    scene, _, prepared = case
    return score_epdms(prepared, scene.candidates, scene.prev_candidates, human_filter=human_filter)


def assert_official(case: Case) -> None:
    """Every number of one vector scene, with and without the human filter."""
    scene, golden, prepared = case
    result = score(case)
    assert result.valid.all()
    fragile = golden.get("v2_fragile_1e3", np.zeros((len(result.nc), len(DISCRETE)), dtype=bool))
    for i, name in enumerate(DISCRETE):
        for prefix, values in (("v2_", getattr(result, name)), ("v2_raw_", result.raw[name])):
            differs = (values != golden[prefix + name]) & ~fragile[:, i]
            assert not differs.any(), (scene.name, prefix, name, np.flatnonzero(differs))
    sure = np.logical_not(fragile.any(axis=1))
    np.testing.assert_array_equal(result.first_fault_step[sure], golden["v2_t_col"][sure])
    np.testing.assert_array_equal(result.first_ttc_step[sure], golden["v2_t_ttc"][sure])
    np.testing.assert_array_equal(result.history_comfort[sure], golden["v2_history_comfort6"][sure])
    np.testing.assert_array_equal(result.ec, golden["v2_ec"])
    np.testing.assert_allclose(result.ec_rms, golden["v2_ec_rms"], rtol=1e-6, atol=2e-8)
    within = tolerance(scene)
    for name, values in (("ep", result.ep), ("raw_ep", result.raw["ep"]), ("epdms", result.epdms)):
        assert (np.abs(values - golden[f"v2_{name}"]) <= within).all(), (scene.name, name)
    np.testing.assert_allclose(result.progress_m, golden["v2_progress_raw"], atol=0.05)
    masked = golden["v2_pdm_progress_raw"].ravel()[0] * golden["v2_pdm_multi"].reshape(-1, 4)[0].prod()
    assert prepared.reference_progress_m == pytest.approx(masked, abs=1e-6)
    assert prepared.human is not None
    for name in HUMAN:
        assert getattr(prepared.human, name) == float(golden[f"v2_human_{name}"]), (scene.name, name)


def assert_official_without_ec(case: Case) -> None:
    scene, golden, prepared = case
    within = tolerance(scene)
    alone = score_epdms(prepared, scene.candidates)
    assert np.isnan(alone.ec).all()
    assert (np.abs(alone.epdms - golden["v2_score_without_ec"]) <= within).all(), scene.name
    if "v2_raw_pdm_score_no_ec" in golden:
        raw = score_epdms(prepared, scene.candidates, human_filter="off")
        assert (np.abs(raw.epdms - golden["v2_raw_pdm_score_no_ec"]) <= within).all(), scene.name


def test_official_vectors(cases: list[Case]) -> None:
    assert sum(len(scene.candidates) for scene, _, _ in cases) == 960
    for case in cases:
        assert_official(case)


def test_official_vectors_on_recordings(recorded_cases: list[Case]) -> None:
    assert sum(len(scene.candidates) for scene, _, _ in recorded_cases) == 640
    for case in recorded_cases:
        assert_official(case)


def test_official_score_without_a_previous_plan(cases: list[Case]) -> None:
    for case in cases:
        assert_official_without_ec(case)


def test_official_score_without_a_previous_plan_on_recordings(recorded_cases: list[Case]) -> None:
    for case in recorded_cases:
        assert_official_without_ec(case)


def test_official_score_without_the_filter_on_recordings(recorded_cases: list[Case]) -> None:
    for case in recorded_cases:
        within = tolerance(case[0])
        assert (np.abs(score(case, human_filter="off").epdms - case[1]["v2_raw_epdms"]) <= within).all()
        assert (np.abs(score(case, human_filter="pre_2025_09_29").epdms - case[1]["v2_raw_epdms"]) <= within).all()


def test_vectors_exercise_every_rule(cases: list[Case]) -> None:
    """Each sub-score takes each of its values, the filter forgives something, and odd time stamps occur."""
    for name, values in (*((n, {0.0, 1.0}) for n in ("dac", "tlc", "ttc", "lk", "hc", "ec")), ("nc", {0.0, 0.5, 1.0})):
        assert {v for case in cases for v in case[1][f"v2_{name}"].tolist()} == values, name
    forgiven = sum(int((case[1][f"v2_{n}"] != case[1][f"v2_raw_{n}"]).sum()) for case in cases for n in HUMAN)
    assert forgiven > 100
    assert [len(prepared.history) for _, _, prepared in cases].count(15) == 5
    assert [len(prepared.history) for _, _, prepared in cases].count(14) == 10


@pytest.mark.parametrize("human_filter", ["on", "off"])
def test_columns_compose_to_the_score(cases: list[Case], human_filter: str) -> None:
    for case in cases:
        result = score(case, human_filter=human_filter)
        columns = {name: getattr(result, name) for name in (*DISCRETE, "ep", "ec")}
        np.testing.assert_array_equal(combine_epdms(columns, with_ec=True), result.epdms)


def test_before_the_correction_the_filter_changed_columns_only(cases: list[Case]) -> None:
    changed = 0
    for case in cases:
        on, off, before = (score(case, human_filter=setting) for setting in ("on", "off", "pre_2025_09_29"))
        for name in (*DISCRETE, "ep", "ec"):
            np.testing.assert_array_equal(getattr(before, name), getattr(on, name))
        np.testing.assert_array_equal(before.epdms, off.epdms)
        changed += int((before.epdms != on.epdms).sum())
    assert changed > 50


def test_rows_do_not_influence_each_other(cases: list[Case]) -> None:
    """Any order and any part of a batch gives the same bits, also beside a plan that fails."""
    rng = np.random.default_rng(0)
    scene, _, prepared = cases[2]
    whole = score(cases[2])
    order = rng.permutation(len(scene.candidates))[:9]
    plans, previous = scene.candidates[order], scene.prev_candidates[order]
    spoilt = plans.copy()
    spoilt[4] = np.nan
    for result, rows in ((score_epdms(prepared, plans, previous), np.arange(9)), (
        score_epdms(prepared, spoilt, previous), np.delete(np.arange(9), 4))):  # fmt: skip
        for name in (*DISCRETE, "ep", "ec", "epdms", "progress_m", "ec_rms", "history_comfort", "states"):
            np.testing.assert_array_equal(getattr(result, name)[rows], getattr(whole, name)[order[rows]], name)
    single = score_epdms(prepared, plans[:1], previous[:1])
    assert single.epdms[0] == whole.epdms[order[0]]
