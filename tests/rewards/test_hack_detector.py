"""Each alert on a run that should raise it, and on one that should not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rewards.hack_detector import Alert, HackDetector, MonitorLimits, slope_over_error
from rlhf_drive.errors import CheckpointError

W = MonitorLimits().window


def run(monitor: str, values: list[float], detector: HackDetector | None = None, first: int = 1) -> list[Alert]:
    """Alerts of a run in which one monitor takes `values`, step by step."""
    detector = detector or HackDetector()
    return [a for i, value in enumerate(values) for a in detector.update(first + i, {monitor: value})]


def names(alerts: list[Alert]) -> list[str]:
    return [alert.name for alert in alerts]


def test_reversal_that_spreads_is_reported_once() -> None:
    alerts = run("monitor/final_reversal", [0.01] * W + [0.30] * 2 * W)
    assert names(alerts) == ["reversal"]
    # Before the latest window is full nothing is said.
    assert alerts[0].step == 2 * W
    assert "30.0% of plans end with a step backwards (1.0% at the start" in alerts[0].message


@pytest.mark.parametrize(
    "values",
    [
        [0.01] * W + [0.045] * 2 * W,  # rises, but is rare
        [0.20] * W + [0.23] * 2 * W,  # frequent, but was so from the start
        [0.01] * W + [0.01] * (W - 1) + [0.40],  # one odd batch: the window's mean is 4.9 %
        [0.01] * W + [0.50] * (W - 1),  # the window is not full
    ],
)
def test_reversal_that_is_rare_old_or_single_is_not_reported(values: list[float]) -> None:
    assert run("monitor/final_reversal", values) == []


def test_standing_still_is_reported_where_it_spreads() -> None:
    alerts = run("monitor/standstill", [0.02] * W + [0.2] * W)
    assert names(alerts) == ["standstill"]
    assert "20.0% of plans stand still where the reference moves (2.0% at the start" in alerts[0].message


@pytest.mark.parametrize("values", [[0.02] * W + [0.09] * W, [0.15] * W + [0.18] * W])
def test_standing_still_within_limits_is_not_reported(values: list[float]) -> None:
    assert run("monitor/standstill", values) == []


@pytest.mark.parametrize("quantity", ["heading_change", "curvature", "longitudinal_jerk", "lateral_jerk"])
@pytest.mark.parametrize(("start", "now"), [(1.0, 2.2), (0.5, 2.2), (3.0, 6.5), (1.0, 0.45), (3.0, 0.45)])
def test_motion_that_drifts_is_reported(quantity: str, start: float, now: float) -> None:
    assert names(run(f"monitor/{quantity}_ratio", [start] * W + [now] * W)) == [f"motion/{quantity}"]


@pytest.mark.parametrize(("start", "now"), [(1.0, 1.9), (0.3, 1.9), (3.0, 5.8), (1.0, 0.55), (0.4, 0.25), (5.0, 1.0)])
def test_motion_near_the_human_or_the_start_is_not_reported(start: float, now: float) -> None:
    assert run("monitor/curvature_ratio", [start] * W + [now] * W) == []


def test_a_few_wild_batches_do_not_make_a_drift() -> None:
    assert run("monitor/lateral_jerk_ratio", [1.0] * W + [30.0, 1.0, 1.1, 0.9, 30.0, 1.0, 1.0, 1.2, 30.0, 1.0]) == []


def test_component_that_saturates_is_reported() -> None:
    alerts = run("monitor/ceiling/dac", [0.8] * W + [0.999] * W)
    assert names(alerts) == ["saturated/dac"]
    assert "dac is at its ceiling in 99.9% of plans (80.0% at the start" in alerts[0].message


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("dac", [0.8] * W + [0.99] * W),  # still told apart in one plan of a hundred
        ("tlc", [1.0] * 2 * W),  # a rule that no scene puts to the test
        ("pdms", [0.2] * W + [1.0] * W),  # an aggregate: its parts are reported
    ],
)
def test_component_that_still_teaches_or_never_did_is_not_reported(column: str, values: list[float]) -> None:
    assert run(f"monitor/ceiling/{column}", values) == []


def test_term_of_a_user_that_is_constant_from_the_start_is_reported() -> None:
    assert names(run("monitor/ceiling/my_term", [1.0] * 2 * W)) == ["saturated/my_term"]
    assert run("monitor/ceiling/my_term", [0.1] * 2 * W) == []


def test_component_that_decides_the_reward_alone_is_reported() -> None:
    assert names(run("monitor/variance_share/ep", [0.5] * W + [0.98] * W)) == ["dominant/ep"]
    assert run("monitor/variance_share/ep", [0.5] * W + [0.90] * W) == []


def look(detector: HackDetector, training: list[float], heldout: list[float], every: int = 5) -> list[Alert]:
    """A run with a held-out evaluation every few steps."""
    found = []
    for i, (reward, score) in enumerate(zip(training, heldout, strict=True)):
        for step in range(every * i + 1, every * (i + 1) + 1):
            found += detector.update(step, {}, reward=reward)
        found += detector.update_heldout(every * (i + 1), score)
    return found


def test_heldout_score_that_falls_while_training_rises_is_reported() -> None:
    alerts = look(HackDetector(), [0.60, 0.63, 0.66, 0.69, 0.72], [0.70, 0.68, 0.66, 0.64, 0.62])
    assert names(alerts) == ["heldout"]
    assert alerts[0].step == 25
    assert "fell by 8.0 points over the last 5 looks (steps 5 to 25)" in alerts[0].message
    assert "rose by 12.0" in alerts[0].message


@pytest.mark.parametrize(
    ("training", "heldout"),
    [
        ([0.60, 0.63, 0.66, 0.69, 0.72], [0.60, 0.62, 0.64, 0.66, 0.68]),  # both rise
        ([0.72, 0.69, 0.66, 0.63, 0.60], [0.70, 0.68, 0.66, 0.64, 0.62]),  # both fall: training is broken, not gamed
        ([0.60, 0.60, 0.60, 0.60, 0.60], [0.70, 0.68, 0.66, 0.64, 0.62]),  # training stands
        ([0.60, 0.63, 0.66, 0.69, 0.72], [0.70, 0.698, 0.696, 0.694, 0.692]),  # a steady fall by 0.8 points
        ([0.60, 0.603, 0.604, 0.606, 0.608], [0.70, 0.68, 0.66, 0.64, 0.62]),  # a steady rise by 0.8 points
        ([0.60, 0.63, 0.66, 0.69, 0.72], [0.70, 0.60, 0.72, 0.58, 0.66]),  # falls by 4.8 points, but jumps about
        ([0.60, 0.63, 0.66, 0.69], [0.70, 0.68, 0.66, 0.64]),  # too few looks
    ],
)
def test_heldout_score_without_a_clear_fall_is_not_reported(training: list[float], heldout: list[float]) -> None:
    assert look(HackDetector(), training, heldout) == []


def test_noise_alone_triggers_nothing_and_a_fall_in_noise_does() -> None:
    rng = np.random.default_rng(0)
    runs, looks = 400, 9
    trend = np.linspace(0.0, 0.1, looks)
    false = true = 0
    for _ in range(runs):
        noise = rng.normal(0.0, 0.01, (2, looks))
        false += bool(look(HackDetector(), list(0.6 + noise[0]), list(0.7 + noise[1]), every=1))
        true += bool(look(HackDetector(), list(0.6 + trend + noise[0]), list(0.7 - trend + noise[1]), every=1))
    # Five tests a run, each with probability 0.0008 in theory: 1.7 of 400 runs.
    assert false <= 6
    assert true / runs > 0.8


def test_noise_in_per_step_monitors_triggers_nothing() -> None:
    rng = np.random.default_rng(1)
    alerts: list[Alert] = []
    for _ in range(50):
        detector = HackDetector()
        for step in range(1, 61):
            # 256 plans a step; shares vary by the binomial, ratios by a quarter.
            monitors = {
                "monitor/final_reversal": rng.binomial(256, 0.05) / 256,
                "monitor/standstill": rng.binomial(256, 0.1) / 256,
                "monitor/ceiling/nc": rng.binomial(256, 0.98) / 256,
            }
            alerts += detector.update(step, monitors | {"monitor/curvature_ratio": rng.lognormal(0.0, 0.25)})
    assert alerts == []


def test_looks_before_any_training_are_left_out() -> None:
    detector = HackDetector()
    assert detector.update_heldout(0, 0.9) == []
    assert detector.state()["evaluations"] == []


def test_training_reward_is_averaged_between_looks() -> None:
    detector = HackDetector()
    for step, reward in enumerate((0.1, math.nan, 0.3), 1):
        detector.update(step, {}, reward=reward)
    detector.update_heldout(3, 0.5)
    assert detector.state()["evaluations"] == [[3.0, pytest.approx(0.2), 0.5]]
    assert detector.state()["rewards"] == []


def test_a_run_without_looks_keeps_no_more_and_more() -> None:
    detector, sizes = HackDetector(), []
    for step in range(1, 201):
        detector.update(step, {"monitor/final_reversal": 0.25}, reward=0.5)
        sizes.append(sum(map(len, (detector.state()["rewards"], *detector.state()["series"].values()))))
    assert sizes[100] == sizes[199]


def test_alert_comes_again_after_it_was_gone() -> None:
    bad, good = [0.4] * W, [0.0] * W
    assert [a.step for a in run("monitor/final_reversal", good + bad + bad + good + bad)] == [2 * W, 4 * W + 2]


def test_alert_that_comes_and_goes_is_not_repeated_within_a_window() -> None:
    # Window means: 0.07 at step 20, 0.049 at 23, 0.062 at 24.
    values = [0.0] * 10 + [0.07] * 10 + [0.0] * 3 + [0.2]
    assert [alert.step for alert in run("monitor/final_reversal", values)] == [20]


def test_monitors_that_are_not_numbers_are_left_out() -> None:
    values = [0.01] * W + [math.nan] * 5 + [0.3] * W
    alerts = run("monitor/final_reversal", values)
    assert [alert.step for alert in alerts] == [2 * W + 5]


def test_state_survives_json_and_goes_on_as_if_nothing_had_happened() -> None:
    rng = np.random.default_rng(3)
    reversal = np.concatenate([rng.uniform(0, 0.02, W), rng.uniform(0.0, 0.3, 25)])
    heldout = 0.7 - 0.02 * np.arange(len(reversal))

    def step(detector: HackDetector, i: int) -> list[Alert]:
        found = detector.update(i, {"monitor/final_reversal": float(reversal[i])}, reward=0.01 * i)
        return found + (detector.update_heldout(i, float(heldout[i])) if i % 3 == 2 else [])

    whole, first = HackDetector(), HackDetector()
    expected = [a for i in range(len(reversal)) for a in step(whole, i)]
    assert names(expected) == ["heldout", "reversal"]
    for split in (5, 17, 24, 30):
        first = HackDetector()
        found = [a for i in range(split) for a in step(first, i)]
        second = HackDetector()
        second.restore(json.loads(json.dumps(first.state())))
        assert found + [a for i in range(split, len(reversal)) for a in step(second, i)] == expected
        assert second.state() == whole.state()


@pytest.mark.parametrize("state", [{}, {"series": 3}, {"series": {}, "given": {}, "active": [], "rewards": ["x"]}])
def test_a_broken_state_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="monitor state"):
        HackDetector().restore(state)


def test_slope_against_its_standard_error() -> None:
    # y = 2 x with residuals (0, 1, -2, 1, 0) orthogonal to 1 and x: error = sqrt(6 / 3 / 10).
    x = np.arange(5.0)
    rise, t = slope_over_error(x, 2.0 * x + [0, 1, -2, 1, 0])
    assert rise == pytest.approx(8.0)
    assert t == pytest.approx(2.0 / math.sqrt(0.2))
    assert slope_over_error(x, 2.0 * x)[1] == math.inf
    assert slope_over_error(x, -2.0 * x)[1] == -math.inf
    assert slope_over_error(x, np.ones(5)) == (0.0, 0.0)
    assert slope_over_error([1.0, 2.0], [1.0, 5.0]) == (0.0, 0.0)


def test_a_condition_that_comes_back_too_soon_is_said_again_later() -> None:
    detector = HackDetector(MonitorLimits(window=3))

    def feed(step: int, share: float, times: int = 3) -> list[str]:
        return [a.name for _ in range(times) for a in detector.update(step, {"monitor/final_reversal": share})]

    assert feed(1, 0.0) == []
    assert feed(10, 0.4) == ["reversal"]
    assert feed(10, 0.0) == []  # gone
    assert feed(11, 0.4) == []  # back within the window: not said again yet
    assert feed(13, 0.4, 1) == ["reversal"]
    assert feed(30, 0.4) == []
