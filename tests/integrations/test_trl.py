"""Our rewards called as TRL calls them, by hand and inside TRL's own GRPOTrainer on a tiny model made here."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards import (
    Failure,
    LocalRewardService,
    Reward,
    RewardSpec,
    RewardStats,
    ScorerInfo,
    Scores,
    build_reward,
)
from rewards.pdm_closed import attach_references
from rewards.plan_text import format_plan, parse_plan, scene_prompt
from rlhf_drive.errors import ConfigError, DataError
from rlhf_drive.integrations import as_trl_reward, prompt_rows
from rlhf_drive.policies import TrajectoryTokenizer
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.generator import generate_scenes
from rlhf_drive.scenes.store import SceneStore

PDMS = build_reward([RewardSpec("pdms", 0.75), RewardSpec("ep", 0.25)])
GRADED = build_reward([RewardSpec("pdms", 0.2), RewardSpec("nc", 0.5), RewardSpec("ttc", 0.3)])
"""Tells random plans apart, almost all of which have a PDMS of 0."""


@pytest.fixture(scope="module")
def scenes() -> dict[str, Scene]:
    made = [attach_references(scene) for scene in generate_scenes(2, seed=3)]
    return {scene.token: scene for scene in made}


def straight(speed: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.stack([0.5 * speed * np.arange(1, 9), np.zeros(8), np.zeros(8)], axis=1)


def scored(scenes: dict[str, Scene], token: str, plan: Any, reward: Reward = PDMS) -> Scores:
    with LocalRewardService(reward, workers=1) as service:
        return service.score([scenes[token]], Trajectories(np.asarray(plan)[None], np.zeros(1)))


def test_value_is_the_services_own(scenes: dict[str, Scene]) -> None:
    a, b = scenes
    plans = [straight(speed) for speed in (3.0, 6.0, 9.0)]
    reward = as_trl_reward(PDMS, scenes)
    values = reward(prompts=[""] * 3, completions=[format_plan(plan) for plan in plans], scene=[b, a, b])
    assert values == [float(scored(scenes, token, plan).total[0]) for token, plan in zip((b, a, b), plans, strict=True)]
    assert len({round(value, 6) for value in values if value is not None}) > 1
    assert reward.__name__ == "driving"


def test_conversational_completions(scenes: dict[str, Scene]) -> None:
    token = next(iter(scenes))
    text = format_plan(straight(5.0))
    forms = [
        [{"role": "assistant", "content": text}],
        [{"role": "assistant", "content": "thinking"}, {"role": "assistant", "content": text}],
        [{"role": "assistant", "content": [{"type": "text", "text": text[:20]}, {"type": "text", "text": text[20:]}]}],
    ]
    values = as_trl_reward(PDMS, scenes)(prompts=[[]] * 3, completions=forms, scene=[token] * 3)
    assert values == [float(scored(scenes, token, straight(5.0)).total[0])] * 3


def test_what_is_no_plan_is_none_and_its_reason_is_logged(scenes: dict[str, Scene]) -> None:
    token = next(iter(scenes))
    extra: dict[str, list[str]] = {}
    metrics: dict[str, float] = {}
    good = format_plan(straight(5.0))
    completions = ["I stop.", good, "", good + "; 1.0 0.0 0.0", []]
    values = as_trl_reward(PDMS, scenes, name="nav")(
        prompts=[""] * 5, completions=completions, completion_ids=[[1]] * 5, scene=[token] * 5,
        trainer_state=None, log_extra=extra.__setitem__, log_metric=metrics.__setitem__,
    )  # fmt: skip
    assert [value is None for value in values] == [True, False, True, True, True]
    (reasons,) = extra.values()
    assert list(extra) == ["nav_failure"]
    assert [bool(reason) for reason in reasons] == [True, False, True, True, True]
    assert "holds 'I'" in reasons[0]
    assert "has 9 poses; write 8" in reasons[3]
    expected = scored(scenes, token, straight(5.0))
    assert metrics == {"nav/valid_frac": 0.2} | {
        f"nav/{name}": float(expected.component(name)[0]) for name in expected.names
    }


def test_row_the_service_cannot_score_is_none(scenes: dict[str, Scene]) -> None:
    extra: dict[str, list[str]] = {}
    lost = {token: scene.with_reference(pdm_reference_v1=np.zeros((0, 3))) for token, scene in scenes.items()}
    values = as_trl_reward(PDMS, lost)(
        prompts=[""], completions=[format_plan(straight(5.0))], scene=[next(iter(lost))], log_extra=extra.__setitem__
    )
    assert values == [None]
    assert "cannot be prepared" in extra["driving_failure"][0]


class OneRowFails:
    """A service whose second row is invalid although a component of it has a value."""

    def score(self, scenes: Any, trajectories: Trajectories, previous: Any = None) -> Scores:
        components, total = np.array([[1.0], [0.2], [0.5]]), np.array([1.0, np.nan, 0.5])
        failure = {1: Failure("mine", "raised", "no luck")}
        return Scores(("nc",), components, total, np.array([True, False, True]), ScorerInfo("x", "1"), failure)

    def submit(self, scenes: Any, trajectories: Trajectories, previous: Any = None) -> Any: ...
    def close(self) -> None: ...

    stats = RewardStats()


def test_means_are_those_of_the_scored_rows(scenes: dict[str, Scene]) -> None:
    metrics: dict[str, float] = {}
    values = as_trl_reward(OneRowFails(), scenes)(
        prompts=[""] * 4,
        completions=[*[format_plan(straight(5.0))] * 3, "?"],
        scene=[next(iter(scenes))] * 4,
        log_metric=metrics.__setitem__,
    )
    assert values == [1.0, None, 0.5, None]
    assert metrics == {"driving/valid_frac": 0.5, "driving/nc": 0.75}


def test_scenes_of_a_store(tiny_store: SceneStore) -> None:
    indices = [5, 2]
    reward = as_trl_reward(PDMS, tiny_store)
    values = reward(
        prompts=["", ""],
        completions=[format_plan(straight(6.0))] * 2,
        scene=[tiny_store.tokens[i] for i in indices],
    )
    with LocalRewardService(PDMS, workers=1) as service:
        plans = Trajectories(np.stack([straight(6.0)] * 2), np.arange(2))
        expected = service.score([tiny_store[i] for i in indices], plans)
    assert values == expected.total.tolist()


def test_column_that_lacks_or_names_nothing(scenes: dict[str, Scene]) -> None:
    reward = as_trl_reward(PDMS, scenes)
    with pytest.raises(DataError, match="no column 'scene'"):
        reward(prompts=[""], completions=[""])
    with pytest.raises(DataError, match="'nowhere', which is not among the 2 scenes"):
        reward(prompts=[""], completions=[""], scene=["nowhere"])
    with pytest.raises(DataError, match="2 rows for 1 completions"):
        reward(prompts=[""], completions=[""], scene=["a", "b"])


def test_two_frame_reward_is_refused(scenes: dict[str, Scene]) -> None:
    with pytest.raises(ConfigError, match="previous frame"):
        as_trl_reward(build_reward([RewardSpec("epdms_two_frame")], scorer="epdms"), scenes)
    with (
        LocalRewardService(build_reward([RewardSpec("epdms_two_frame")], scorer="epdms")) as service,
        pytest.raises(ConfigError, match="previous frame"),
    ):
        as_trl_reward(service, scenes)


TOKENS = TrajectoryTokenizer("displacements", -1.0, 6.0, 0.25)


def test_plans_of_token_ids(scenes: dict[str, Scene]) -> None:
    token = next(iter(scenes))
    (numbers,) = TOKENS.encode(straight(6.0)[None]).tolist()
    ids = [number + 10 for number in numbers]
    extra: dict[str, list[str]] = {}
    rows = [ids, [*ids, 2], ids[:-1], [*ids[:-1], 2], [*ids, 11], [*ids, 2, 11], [2, *ids], []]
    values = as_trl_reward(PDMS, scenes, tokenizer=TOKENS, first_id=10)(
        prompts=[""] * 8, completions=[""] * 8, completion_ids=rows, scene=[token] * 8, log_extra=extra.__setitem__
    )
    expected = float(scored(scenes, token, TOKENS.decode(np.array([numbers]))[0]).total[0])
    assert values == [expected, expected, *[None] * 6]
    counts = [15, 15, 17, None, 0, 0]
    for reason, count in zip(extra["driving_failure"][2:], counts, strict=True):
        assert reason == "numeric tokens follow the end of the plan" or f"starts with {count} numeric" in reason
    with pytest.raises(DataError, match="no completion_ids"):
        as_trl_reward(PDMS, scenes, tokenizer=TOKENS)(prompts=[""], completions=[""], scene=[token])


def test_prompt_rows(scenes: dict[str, Scene]) -> None:
    first = next(iter(scenes.values()))
    text = scene_prompt(first.observation)
    assert prompt_rows([first]) == [{"prompt": text, "scene": first.token}]
    assert prompt_rows([first], conversational=True)[0]["prompt"] == [{"role": "user", "content": text}]


SPECIAL = ["<end>", "<unk>"]


def tiny_model(words: list[str]) -> tuple[Any, Any]:
    """A random causal model over `words` and its tokenizer, which joins them by spaces."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<end>", pad_token="<end>", unk_token="<unk>", padding_side="left"
    )
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config), tokenizer


def trained(reward: Callable[..., Any], scenes: dict[str, Scene], words: list[str], length: int, folder: Path) -> Any:
    """Two steps of TRL's GRPO, and what the reward was called with and answered."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    calls: list[tuple[dict[str, Any], list[float | None]]] = []

    @functools.wraps(reward)
    def noted(**arguments: Any) -> list[float | None]:
        calls.append((arguments, reward(**arguments)))
        return calls[-1][1]

    model, tokenizer = tiny_model(words)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    arguments = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=16, num_generations=8, max_completion_length=length,
        max_steps=2, logging_steps=1, learning_rate=0.01, beta=0.0, report_to="none", use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True, seed=1,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=noted,
        args=arguments,
        train_dataset=Dataset.from_list(prompt_rows(scenes.values())),
        processing_class=tokenizer,
    )
    trainer.train()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    return calls, trainer.state.log_history, sum(moved)


def check_run(calls: list[Any], history: list[Any], moved: int, scenes: dict[str, Scene]) -> list[float]:
    """What holds of every run: TRL logs our values, and None stays out of them. Returns all values."""
    assert len(calls) == 2
    everything = []
    for (arguments, values), logged in zip(calls, history, strict=False):
        assert set(arguments["scene"]) == set(scenes)
        found = [value for value in values if value is not None]
        assert 0 < len(found) < len(values) == 16
        assert logged["rewards/driving/mean"] == pytest.approx(np.mean(found), abs=1e-6)
        assert logged["driving/valid_frac"] == len(found) / 16
        assert 0.0 <= logged["driving/nc"] <= 1.0
        everything += found
    assert moved > 0
    assert len(set(everything)) > 2
    return everything


def test_text_plans_in_trls_own_trainer(scenes: dict[str, Scene], tmp_path: Path) -> None:
    pytest.importorskip("trl")
    words = [f"{x:.1f} {y:.1f} 0.0;" for x in np.arange(0.0, 20.0, 1.5) for y in (0.0, 0.1, -0.2)]
    calls, history, moved = trained(as_trl_reward(GRADED, scenes), scenes, words, 8, tmp_path)
    check_run(calls, history, moved, scenes)
    for arguments, values in calls:
        for completion, token, value in zip(arguments["completions"], arguments["scene"], values, strict=True):
            try:
                plan = parse_plan(completion)
            except DataError:
                assert value is None
            else:
                assert value == float(scored(scenes, token, plan, GRADED).total[0])


def test_token_plans_in_trls_own_trainer(scenes: dict[str, Scene], tmp_path: Path) -> None:
    pytest.importorskip("trl")
    words = [f"n{i}" for i in range(TOKENS.vocab_size)]
    reward = as_trl_reward(GRADED, scenes, tokenizer=TOKENS, first_id=len(SPECIAL))
    calls, history, moved = trained(reward, scenes, words, TOKENS.length, tmp_path)
    check_run(calls, history, moved, scenes)
    for arguments, values in calls:
        for ids, token, value in zip(arguments["completion_ids"], arguments["scene"], values, strict=True):
            if len(ids) == 16 and min(ids) >= 2:
                plan = TOKENS.decode(np.array([ids]) - 2)[0]
                assert value == float(scored(scenes, token, plan, GRADED).total[0])
            else:
                assert value is None
    assert not any(math.isnan(value) for _, values in calls for value in values if value is not None)
