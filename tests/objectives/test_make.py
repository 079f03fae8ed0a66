"""Settings that cannot be meant are refused, all at once, with what to do."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_drive.errors import ConfigError
from rlhf_drive.objectives import IMPORTANCE_SAMPLING_LEVELS, LOSS_TYPES, ObjectiveSettings, make_objective
from rlhf_drive.objectives.make import load_part, objective_problems


def _problems(**changes: Any) -> list[str]:
    return list(objective_problems(ObjectiveSettings(**changes)))


def test_all_problems_are_said_at_once() -> None:
    settings = ObjectiveSettings(
        "gropo", "tokens", epsilon=0.0, epsilon_high=float("inf"), delta=-1.0, sapo_temperature_pos=0.0,
        sapo_temperature_neg=float("nan"), beta=-0.1, kl_estimator="k4", kl_in="advantage", entropy_coef=-1.0,
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        make_objective(settings)
    named = {line.split()[0] for line in str(caught.value).splitlines()}
    assert named == {
        *("rl.loss_type", "rl.importance_sampling_level", "rl.epsilon", "rl.epsilon_high", "rl.delta", "rl.beta"),
        *("rl.sapo_temperature_pos", "rl.sapo_temperature_neg", "rl.kl_estimator", "rl.kl_in", "rl.entropy_coef"),
    }
    assert "Did you mean 'grpo'?" in str(caught.value)
    assert "Did you mean 'token'?" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "cispo", "epsilon_high": 0.28}, "is the cap of the ratio itself"),
        ({"loss_type": "cispo", "epsilon_high": 5.0, "delta": 8.0}, "rl.delta = 8.0 has no effect"),
        ({"delta": 1.2}, "must lie above 1 + rl.epsilon_high = 1.2"),
        ({"loss_type": "gmpo", "importance_sampling_level": "token"}, "Set it to 'sequence'"),
        ({"use_bias_correction_kl": True, "beta": 0.1, "kl_in": "reward"}, "Set it to false"),
    ],
)
def test_combinations_without_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    (problem,) = _problems(**changes)
    assert message in problem


@pytest.mark.parametrize("level", IMPORTANCE_SAMPLING_LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_named_objective_has_settings_without_problem(loss_type: str, level: str) -> None:
    level = "sequence" if loss_type == "gmpo" else level
    high = 5.0 if loss_type == "cispo" else 0.28
    assert _problems(loss_type=loss_type, importance_sampling_level=level, epsilon_high=high, delta=0.0) == []


def test_a_function_without_signature_is_taken_as_it_is() -> None:
    assert load_part("builtins:max", "rl.loss_type", "inputs, denominators") is max
