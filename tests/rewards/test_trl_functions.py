"""TRL's reward functions as terms: what they get, what they may return, and what becomes of rows they leave out."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import rewards.trl_functions
from rewards import PDMS_COMPONENTS, LocalRewardService, RewardInputs, RewardSpec, build_reward, resolve_reward
from rewards.partly_scored import PartlyScoredError
from rewards.plan_text import format_plan, parse_plan, scene_prompt
from rewards.trl_functions import trl_reward
from rlhf_drive.errors import ConfigError
from rlhf_drive.registry import load_function
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.generator import generate_scenes

Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(generate_scenes(2, seed=1))


def inputs(scenes: list[Scene], rows: int = 4) -> RewardInputs:
    poses = np.random.default_rng(0).normal(scale=10.0, size=(rows, 8, 3))
    components = {name: np.linspace(0.0, 1.0, rows) + i for i, name in enumerate(PDMS_COMPONENTS)}
    components["ec"] = np.full(rows, np.nan)
    return RewardInputs(scenes, Trajectories(poses, np.arange(rows) // 2), components)


def test_function_gets_what_trl_would_give_it(scenes: list[Scene]) -> None:
    seen: dict[str, Any] = {}

    def everything(prompts, completions, **columns):  # type: ignore[no-untyped-def]
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.25, 0.5, 0.75, 1]

    given = inputs(scenes)
    assert trl_reward(everything)(given).tolist() == [0.25, 0.5, 0.75, 1.0]
    assert seen["completions"] == [format_plan(poses) for poses in given.trajectories.poses]
    np.testing.assert_allclose(parse_plan(seen["completions"][3]), given.trajectories.poses[3], atol=0.5001e-4)
    assert seen["poses"] == given.trajectories.poses.tolist()
    a, b = scenes
    assert seen["prompts"] == [scene_prompt(scene.observation) for scene in (a, a, b, b)]
    assert seen["scene"] == [a.token, a.token, b.token, b.token]
    assert seen["kind"] == [a.kind, a.kind, b.kind, b.kind]
    assert set(seen["command"]) <= {"left", "straight", "right"}
    assert seen["speed_mps"] == [s.observation.speed_mps for s in (a, a, b, b)]
    assert seen["dac"] == [1.0, 1.0 + 1 / 3, 1.0 + 2 / 3, 2.0]
    assert seen["ec"] == [None] * 4
    assert seen["trainer_state"] is None
    assert seen["log_extra"]("column", [1]) is None
    assert seen["log_metric"]("name", 1.0) is None
    assert "completion_ids" not in seen


def test_conversational_form(scenes: list[Scene]) -> None:
    def roles(prompts, completions):  # type: ignore[no-untyped-def]
        assert prompts[0][0]["role"] == "user"
        assert completions[0][0]["role"] == "assistant"
        return [float(len(parse_plan(completion[-1]["content"]))) for completion in completions]

    assert trl_reward(roles, conversational=True)(inputs(scenes)).tolist() == [8.0] * 4


def test_function_gets_only_what_it_names(scenes: list[Scene]) -> None:
    def strict(completions: list[str], *, nc: list[float], step: int = 3) -> list[float]:
        return [value * step for value in nc]

    np.testing.assert_allclose(trl_reward(strict)(inputs(scenes)), [0.0, 1.0, 2.0, 3.0])


ASYNC = """
import asyncio
LOOPS = []

async def slow(completions, **kwargs):
    LOOPS.append(asyncio.get_running_loop())
    await asyncio.sleep(0.001)
    return [float(text.split()[0]) for text in completions]

async def hangs(completions, **kwargs):
    await asyncio.sleep(0.0 if completions[0].startswith("0") else 60.0)
    return [0.5] * len(completions)
"""


def test_async_function_keeps_its_loop(user_file: Path, scenes: list[Scene]) -> None:
    user_file.write_text(ASYNC)
    plans = Trajectories(np.full((3, 8, 3), 0.25), np.zeros(3))
    with service(user_file, "slow") as scorer:
        for _ in range(2):
            assert scorer.score(scenes, plans).total.tolist() == [0.625] * 3  # (1 + 0.25) / 2
    loops = load_function(f"{user_file}:slow").__globals__["LOOPS"]  # type: ignore[attr-defined]
    assert len(loops) == 2
    assert loops[0] is loops[1]


def test_async_function_that_hangs_costs_its_row(user_file: Path, scenes: list[Scene]) -> None:
    user_file.write_text(ASYNC)
    plans = np.zeros((3, 8, 3))
    plans[1, 0, 0] = 7.0
    with service(user_file, "hangs", timeout_s=0.2) as scorer:
        scores = scorer.score(scenes, Trajectories(plans, np.zeros(3)))
        assert scorer.stats.abandoned == 0
    assert {row: failure.kind for row, failure in scores.failures.items()} == {1: "timeout"}
    np.testing.assert_array_equal(scores.total, [0.75, np.nan, 0.75])


class Judge:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    async def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return [self.factor] * len(completions)


def test_partial_and_callable_object(scenes: list[Scene]) -> None:
    def scaled(factor, completions, **kwargs):  # type: ignore[no-untyped-def]
        return [factor] * len(completions)

    assert trl_reward(partial(scaled, 3.0))(inputs(scenes)).tolist() == [3.0] * 4
    assert trl_reward(partial(scaled, factor=4.0))(inputs(scenes)).tolist() == [4.0] * 4
    assert asyncio.run(trl_reward(Judge(5.0))(inputs(scenes))).tolist() == [5.0] * 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        np.array([0.0, 0.5, 1.0, 2.0], dtype=np.float32),
        torch.tensor([0.0, 0.5, 1.0, 2.0]),
        (0, np.float64(0.5), True, np.int64(2)),
        [torch.tensor(0.0), np.array(0.5), 1, 2.0],
    ],
)
def test_numbers_of_any_make(scenes: list[Scene], values: Any) -> None:
    def fixed(completions, **kwargs):  # type: ignore[no-untyped-def]
        return values

    assert trl_reward(fixed)(inputs(scenes)).tolist() == [0.0, 0.5, 1.0, 2.0]


def test_row_that_is_not_scored_is_never_a_zero(scenes: list[Scene]) -> None:
    def partly(completions, **kwargs):  # type: ignore[no-untyped-def]
        return [None, 0.5, float("nan"), "high", 10**400]

    with pytest.raises(PartlyScoredError) as caught:
        trl_reward(partly)(_five(scenes))
    np.testing.assert_array_equal(caught.value.values, [np.nan, 0.5, np.nan, np.nan, np.nan])
    kinds = {row: kind for row, (kind, _) in caught.value.failures.items()}
    assert kinds == {0: "unavailable", 2: "not_finite", 3: "wrong_output", 4: "not_finite"}
    assert "returned None: not scored" in caught.value.failures[0][1]
    assert "returned 'high', not a number" in caught.value.failures[3][1]


def _five(scenes: list[Scene]) -> RewardInputs:
    return RewardInputs(scenes, Trajectories(np.zeros((5, 8, 3)), np.zeros(5)), {})


def test_needs_that_cannot_be_met_are_named_at_once() -> None:
    def with_ids(prompts, completion_ids, solution):  # type: ignore[no-untyped-def]
        return []

    with pytest.raises(ConfigError, match=r"'with_ids' needs completion_ids, solution, which is not there"):
        trl_reward(with_ids)


SOURCE = """
def last_x(completions, scene, **kwargs):
    out = []
    for text in completions:
        x = float(text.split(";")[-1].split()[0])
        if x < 0:
            raise ValueError("backwards")
        out.append(None if x > 50 else x / 100)
    return out

def short(completions, **kwargs):
    return [1.0]

def lane(completions, lk):
    return lk
"""


def service(path: Path, function: str, timeout_s: float = 0.0) -> LocalRewardService:
    terms = [RewardSpec("pdms", 1.0), RewardSpec("trl", 1.0, {"function": f"{path}:{function}"})]
    return LocalRewardService(
        build_reward(terms, scorer=f"{path.parent / 'scorer.py'}:ones"), workers=1, timeout_s=timeout_s
    )


SCORER = """
import numpy as np
from rewards import PDMS_COMPONENTS, ScorerInfo
from rewards.scorer import Scorer

def ones():
    def score(prepared, poses, previous):
        return {name: np.ones(len(poses)) for name in PDMS_COMPONENTS}
    return Scorer(ScorerInfo("ones", "1"), PDMS_COMPONENTS, lambda token, reference: None, score)
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    (tmp_path / "scorer.py").write_text(SCORER)
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path / "mine.py"


def test_in_the_service_rows_fail_alone_with_their_reason(user_file: Path, scenes: list[Scene]) -> None:
    poses = np.zeros((6, 8, 3))
    poses[:, -1, 0] = [10.0, 60.0, -1.0, 20.0, 30.0, 40.0]
    scores = service(user_file, "last_x").score(scenes, Trajectories(poses, np.arange(6) // 3))
    np.testing.assert_allclose(scores.total, [0.55, np.nan, np.nan, 0.6, 0.65, 0.7])  # (1 + x / 100) / 2
    assert {row: failure.kind for row, failure in scores.failures.items()} == {1: "unavailable", 2: "raised"}
    assert "returned None" in scores.failures[1].reason
    assert "backwards" in scores.failures[2].reason


def test_in_the_service_a_wrong_length_loses_the_rows(user_file: Path, scenes: list[Scene]) -> None:
    scores = service(user_file, "short").score(scenes, Trajectories(np.zeros((3, 8, 3)), np.zeros(3)))
    assert not scores.valid.any()
    assert {failure.kind for failure in scores.failures.values()} == {"wrong_output"}
    assert "'short' returned 1 values for 3 rows" in scores.failures[0].reason


def test_component_of_another_scorer_is_a_reason(user_file: Path, scenes: list[Scene]) -> None:
    scores = service(user_file, "lane").score(scenes, Trajectories(np.zeros((2, 8, 3)), np.zeros(2)))
    assert "'lane' needs lk, which this scorer lacks" in scores.failures[1].reason


def test_column_has_the_functions_name(user_file: Path) -> None:
    user_file.write_text(
        "def calm(completions, scale=1.0, **kwargs):\n    return [scale] * len(completions)\n"
        "def nc(completions, **kwargs):\n    return [1.0] * len(completions)\n"
        "odd = lambda completions, **kwargs: [2.0] * len(completions)\n"
    )
    specs = [RewardSpec("trl", 1.0, {"function": f"{user_file}:{name}"}) for name in ("calm", "nc", "odd")]
    again = RewardSpec("trl", 1.0, {"function": f"{user_file}:calm", "conversational": True})
    reward = build_reward([RewardSpec("pdms"), *specs, again])
    assert reward.names == (*PDMS_COMPONENTS, "calm", "trl", "trl_2", "calm_2")  # not over the component nc


def test_relative_path_holds_for_workers_elsewhere(user_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user_file.parent)
    reward = build_reward([RewardSpec("pdms"), RewardSpec("trl", 1.0, {"function": "mine.py:last_x"})])
    monkeypatch.chdir("/")
    assert reward.config.build().names[-1] == "last_x"


def test_function_that_is_not_there_is_refused_when_the_recipe_is_read(user_file: Path) -> None:
    assert resolve_reward("trl").function is rewards.trl_functions.trl
    with pytest.raises(ConfigError, match=r"terms\[1\].options: reward 'trl': .*has no function 'last_y'"):
        service(user_file, "last_y")
    with pytest.raises(ConfigError, match=r"options.function \(str\) is missing"):
        build_reward([RewardSpec("pdms"), RewardSpec("trl")])
