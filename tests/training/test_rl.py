"""The RL loop: it refuses to start on wrong likelihoods, and learns nothing from what could not be scored."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewards import Failure, LocalRewardService, RewardSpec, ScorerInfo, Scores, build_reward
from rewards.hack_detector import Alert
from rlhf_drive.config import Recipe
from rlhf_drive.errors import RewardError, TrainingError
from rlhf_drive.policies import Decoding, Policy, load_adapter, load_policy, merged
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.build import build_accelerator, build_policy, build_trainer, sampling_of, visiting_of
from rlhf_drive.training.engine import TrainingEngine
from rlhf_drive.training.rl import LoopSettings, check_likelihood, reward_metrics, train_rl
from rlhf_drive.training.step_collector import Services
from rollout import LocalRolloutService, Rollout, RolloutStats

FEATURES = FeatureCache()
REWARD = '''
import numpy as np

def odd(inputs):
    """Whether a plan ends 0 … 0.5, 4 … 4.5, 8 … 8.5 m … ahead: about one in eight."""
    return np.floor(2.0 * np.abs(inputs.trajectories.poses[:, -1, 0])) % 8 == 0

def leftness(inputs):
    return np.tanh(inputs.trajectories.poses[:, -1, 1])

def nan(inputs):
    return np.where(odd(inputs), np.nan, leftness(inputs))

def infinite(inputs):
    return np.where(odd(inputs), np.inf, leftness(inputs))

def zero(inputs):
    return np.where(odd(inputs), 0.0, leftness(inputs))

def failing(inputs):
    if odd(inputs).any():
        raise ValueError("odd plan")
    return leftness(inputs)
'''


@dataclass
class Notes:
    """A journal that keeps what it is told."""

    lines: list[dict[str, float]] = field(default_factory=list)
    alerts: list[Alert] = field(default_factory=list)

    def resume(self, step: int) -> None:
        """As the protocol says."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """As the protocol says."""
        assert step == len(self.lines) + 1
        self.lines.append(dict(metrics))

    def warn(self, alert: Alert) -> None:
        """As the protocol says."""
        self.alerts.append(alert)

    def note(self, text: str) -> None:
        """As the protocol says."""


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    return tiny_recipe("quickstart", "rl.learning_rate=1e-3", "rollout.num_generations=6", "rl.max_steps=3")


@pytest.fixture
def policy(recipe: Recipe) -> Policy:
    return build_policy(recipe, torch.device("cpu")).eval()


@pytest.fixture
def scenes(tiny_store: SceneStore) -> list[Scene]:
    return tiny_store.split("train")[:9]


@pytest.fixture
def train(recipe: Recipe, policy: Policy, scenes: list[Scene], tmp_path: Path) -> Callable[..., Notes]:
    """``train(function, limit, rollouts=None)``: three steps with a reward of `REWARD`; the journal."""
    source = tmp_path / "rewards.py"
    source.write_text(REWARD)

    def run(function: str, limit: float, notes: Notes, rollouts: Any = None, **changes: Any) -> Notes:
        trainer = build_trainer(
            replace(recipe.rl, **{"num_iterations": 1, **changes}), policy, seed=0, features=FEATURES,
            accelerator=build_accelerator("cpu"), folder=tmp_path / function,
        )  # fmt: skip
        reward = build_reward([RewardSpec(f"{source}:{function}", 1.0)])
        train_rl(
            trainer,
            Services(
                rollouts or LocalRolloutService(policy, seed=0, features=FEATURES),
                LocalRewardService(reward, workers=1),
            ),
            scenes, tmp_path / function,
            sampling=replace(sampling_of(recipe.rollout), scenes_per_step=6, scenes_per_chunk=6),
            visiting=visiting_of(recipe.rl), journal=notes,
            settings=LoopSettings(seed=0, save_steps=10, keep_checkpoints=1, max_invalid_fraction=limit),
        )  # fmt: skip
        return notes

    return run


def _checked(policy: Policy, rollouts: Any, scenes: list[Scene], decoding: Decoding) -> float:
    """The self-test of a trainer that holds `policy`."""
    engine = TrainingEngine(policy, learning_rate=0.0, weight_decay=0.0, accelerator=build_accelerator("cpu"))
    return check_likelihood(engine, Services(rollouts, None), scenes, decoding, FEATURES)


class Stale:
    """A rollout service that goes on sampling with the weights it was made with, a little off."""

    def __init__(self, policy: Policy, noise: float) -> None:
        sampler = copy.deepcopy(policy)
        with torch.no_grad():
            sampler.head.mixture.bias.add_(noise * torch.linspace(-1.0, 1.0, len(sampler.head.mixture.bias)))
        self.inner = LocalRolloutService(sampler, seed=0, features=FEATURES)

    @property
    def stats(self) -> RolloutStats:
        """As the protocol says."""
        return self.inner.stats

    def close(self) -> None:
        """As the protocol says."""

    def push_weights(self, policy: Policy, version: int) -> None:
        """Broken: keeps its own."""

    def sample(
        self,
        scenes: Sequence[Scene],
        num_generations: int,
        decoding: Decoding,
        *,
        step: int,
        keep_experts: bool = False,
    ) -> Rollout:
        """As the protocol says."""
        return self.inner.sample(scenes, num_generations, decoding, step=step, keep_experts=keep_experts)


@pytest.mark.parametrize("order", ["causal", "random", "confidence"])
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 5)])
def test_the_start_up_test_passes_for_the_weights_that_sampled(
    policy: Policy, scenes: list[Scene], order: str, temperature: float, top_k: int
) -> None:
    decoding = Decoding(5, order, temperature, top_k)
    rollouts = LocalRolloutService(policy, seed=0, features=FEATURES)
    assert 0 <= _checked(policy, rollouts, scenes, decoding) < 1e-5


def test_the_start_up_test_refuses_stale_weights(
    policy: Policy, scenes: list[Scene], train: Callable[..., Notes], tmp_path: Path
) -> None:
    decoding = Decoding(5, "causal", 1.0, 0)
    with pytest.raises(TrainingError, match="importance ratios would be wrong from the first update on"):
        _checked(policy, Stale(policy, 0.05), scenes, decoding)
    # With the right weights the stub passes, so the refusal above is about the weights.
    assert _checked(policy, Stale(policy, 0.0), scenes, decoding) < 1e-5
    notes = Notes()
    with pytest.raises(TrainingError, match="differ from the sampler's by up to"):
        train("leftness", 0.0, notes, Stale(policy, 0.05))
    assert notes.lines == []
    assert not (tmp_path / "leftness" / "policy").exists()


def test_broken_weights_do_not_pass_as_equal(policy: Policy, scenes: list[Scene]) -> None:
    rollouts = Stale(policy, 0.0)
    with torch.no_grad():
        policy.head.mixture.bias.fill_(torch.nan)
    with pytest.raises(TrainingError, match="by up to nan nats"):
        _checked(policy, rollouts, scenes, Decoding(4, "causal", 1.0, 0))


def test_too_many_unscored_rows_stop_the_run_before_it_learns(train: Callable[..., Notes], policy: Policy) -> None:
    before = copy.deepcopy(policy.state_dict())
    notes = Notes()
    with pytest.raises(RewardError, match=r"of 36 rollouts .* could not be scored; 5\.0% are tolerated") as raised:
        train("nan", 0.05, notes)
    assert "reward 'nan': returned nan" in str(raised.value)
    assert notes.lines == []
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


def test_rows_that_a_reward_cannot_score_are_counted_and_not_learned_from(
    train: Callable[..., Notes], policy: Policy, tmp_path: Path
) -> None:
    initial = copy.deepcopy(policy.state_dict())
    runs: dict[str, Notes] = {}
    ends: dict[str, dict[str, torch.Tensor]] = {}
    for function in ("nan", "infinite", "failing", "zero"):
        policy.load_state_dict(initial)
        runs[function] = train(function, 0.9, Notes())
        ends[function] = load_policy(tmp_path / function / "policy").state_dict()
    shares = [line["reward/invalid_frac"] for line in runs["nan"].lines]
    assert len(shares) == 3
    assert all(36 * share == pytest.approx(round(36 * share), abs=1e-9) for share in shares)
    assert 0.02 < np.mean(shares) < 0.5
    assert [line["reward/invalid_frac"] for line in runs["zero"].lines] == [0.0, 0.0, 0.0]
    for other in ("infinite", "failing"):
        assert all(torch.equal(ends["nan"][name], value) for name, value in ends[other].items())
        for a, b in zip(runs["nan"].lines, runs[other].lines, strict=True):
            timeless = [{k: v for k, v in line.items() if not k.startswith(("time/", "failures/")) and n not in k}
                        for line, n in ((a, "nan"), (b, other))]  # fmt: skip
            assert timeless[0] == timeless[1]
    # A zero is a reward like any other: it is learned from.
    assert any(not torch.equal(ends["nan"][name], value) for name, value in ends["zero"].items())
    assert any(not torch.equal(initial[name], value) for name, value in ends["nan"].items())


def test_reward_metrics_by_hand() -> None:
    total = np.array([0.2, 0.6, np.nan, 0.4, np.nan, np.nan, np.nan, np.nan, 1.0])
    valid = np.isfinite(total)
    part = np.where(valid, 1.0 - total, 7.0)  # what an invalid row holds counts nowhere
    part[0] = np.nan
    scores = Scores(
        ("pdms", "part", "absent"), np.stack([total, part, np.full(9, np.nan)], axis=1), total, valid,
        ScorerInfo("pdms", "NAVSIM v1.1"),
        {int(row): Failure("part", "raised" if row < 5 else "timeout", "no") for row in np.flatnonzero(~valid)},
    )  # fmt: skip
    found = reward_metrics(scores, 3)
    assert found == pytest.approx(
        {
            "reward/invalid_frac": 5 / 9,
            "failures/part/raised": 2.0,
            "failures/part/timeout": 3.0,
            "reward/total": (0.2 + 0.6 + 0.4 + 1.0) / 4,
            "reward/best_of_group": (0.6 + 0.4 + 1.0) / 3,
            "reward/pdms": (0.2 + 0.6 + 0.4 + 1.0) / 4,
            "reward/part": (0.4 + 0.6 + 0.0) / 3,
        }
    )
    failure = Failure("scene", "invalid_scene", "no")
    nothing = replace(scores, valid=np.zeros(9, dtype=np.bool_), failures=dict.fromkeys(range(9), failure))
    assert reward_metrics(nothing, 3) == {"reward/invalid_frac": 1.0, "failures/scene/invalid_scene": 9.0}


def test_a_checkpoint_carries_what_the_monitors_have_seen(train: Callable[..., Notes], tmp_path: Path) -> None:
    notes = train("leftness", 0.0, Notes())
    newest = sorted((tmp_path / "leftness" / "checkpoints").glob("step-*"))[-1]
    seen = json.loads((newest / "state.json").read_text())["values"]["watch"]["series"]["monitor/final_reversal"]
    assert [value for part in seen for value in part] == [line["monitor/final_reversal"] for line in notes.lines]
    assert len(notes.lines) == 3


def test_adapters_alone_and_the_policy_with_them_are_the_same_averages(
    train: Callable[..., Notes], recipe: Recipe, policy: Policy, tmp_path: Path
) -> None:
    train("leftness", 0.0, Notes(), lora_rank=2, lora_alpha=4.0, ema_decay=0.5)
    whole = load_policy(tmp_path / "leftness" / "policy").state_dict()
    base = build_policy(recipe, torch.device("cpu"))
    alone = merged(load_adapter(base, tmp_path / "leftness" / "adapter")).state_dict()
    last = merged(policy).state_dict()
    assert set(whole) == set(alone)
    for name, value in whole.items():
        torch.testing.assert_close(alone[name], value, rtol=0, atol=1e-7)
    # The last weights are others: three steps weigh 1/2, 1/4 and 1/8 in the average.
    assert max(float((last[name] - value).abs().max()) for name, value in whole.items()) > 1e-4


def test_a_step_that_fails_leaves_a_checkpoint_of_the_one_before(
    recipe: Recipe, policy: Policy, scenes: list[Scene], tmp_path: Path
) -> None:
    """What follows from it is what an undisturbed run does."""

    def train(folder: Path, fails_at: int | None) -> Notes:
        notes = Notes()
        trainer = build_trainer(
            replace(recipe.rl, ema_decay=0.5), copy.deepcopy(policy), seed=0, features=FEATURES,
            accelerator=build_accelerator("cpu"), folder=folder,
        )  # fmt: skip
        learn = trainer.step

        def step(number: int, *args: Any) -> dict[str, float]:
            if number == fails_at:
                raise TrainingError("Step 3: broken.")
            return learn(number, *args)

        trainer.step = step  # type: ignore[method-assign]
        source = tmp_path / "rewards.py"
        source.write_text(REWARD)
        reward = build_reward([RewardSpec(f"{source}:leftness", 1.0)])
        services = Services(
            LocalRolloutService(trainer.policy, seed=0, features=FEATURES), LocalRewardService(reward, workers=1)
        )
        notes.lines += [{}] * (2 if (folder / "checkpoints").exists() else 0)
        train_rl(
            trainer, services, scenes, folder, journal=notes,
            sampling=replace(sampling_of(recipe.rollout), scenes_per_step=6, scenes_per_chunk=6),
            visiting=visiting_of(replace(recipe.rl, scene_visits="informative")),
            settings=LoopSettings(seed=0, save_steps=10, keep_checkpoints=2, max_invalid_fraction=0.0),
        )  # fmt: skip
        return notes

    whole = train(tmp_path / "whole", None)
    with pytest.raises(TrainingError, match=r"Step 3: broken. The state after step 2 is kept as a checkpoint."):
        train(tmp_path / "broken", 2)
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == ["step-000002"]
    resumed = train(tmp_path / "broken", None)
    told = [{k: v for k, v in n.lines[-1].items() if not k.startswith("time/")} for n in (whole, resumed)]
    assert told[0] == told[1]
    weights = [load_policy(tmp_path / name / "policy").state_dict() for name in ("whole", "broken")]
    assert all(bool((value == weights[1][name]).all()) for name, value in weights[0].items())
