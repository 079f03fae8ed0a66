"""Our rewards in TRL's trainers: a reward function of TRL's form that scores plans written as text or tokens.

    rows = prompt_rows(scenes.values())
    trainer = GRPOTrainer(
        model, reward_funcs=as_trl_reward(build_reward([RewardSpec("pdms")]), scenes),
        args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )

TRL itself is not imported: any trainer that calls ``f(prompts, completions, **columns)`` can use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rewards import LocalRewardService, Reward, RewardService, Scores
from rewards.plan_text import parse_plan, scene_prompt
from rlhf_drive.errors import ConfigError, DataError
from rlhf_drive.policies import TrajectoryTokenizer
from rlhf_drive.scenes import NUM_POSES, Scene, Trajectories
from rlhf_drive.scenes.store import SceneStore

__all__ = ["TrlReward", "as_trl_reward", "prompt_rows"]

Parse = Callable[[str], NDArray[np.float64]]


class TrlReward(Protocol):
    """The form TRL calls."""

    __name__: str

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """One reward for every completion, None where it could not be scored."""
        ...


def as_trl_reward(
    reward: RewardService | Reward,
    scenes: Mapping[str, Scene] | SceneStore,
    *,
    parse: Parse = parse_plan,
    tokenizer: TrajectoryTokenizer | None = None,
    first_id: int = 0,
    name: str = "driving",
) -> TrlReward:
    """A reward function for TRL's trainers.

    The dataset's column `scene` names the scene of each prompt by token. A completion that is no plan, or a plan that
    cannot be scored, is None: TRL leaves it out of its group, it is no zero. TRL's `log_metric` receives
    ``{name}/valid_frac`` and the mean of every component, `log_extra` the reasons as column ``{name}_failure``.

    Args:
        reward: A running service, or a reward that a service in this process is started for.
        scenes: Where scenes are found by token.
        parse: Makes poses ``[8, 3]`` of a completion's text; raises DataError, as :func:`rewards.plan_text.parse_plan`
            does, for text that is none.
        tokenizer: Reads plans from `completion_ids` instead of text: id ``first_id + k`` is its token k.
        first_id: Id of the tokenizer's token 0 in the model's vocabulary.
        name: What TRL logs the reward as.

    Returns:
        The function. It raises DataError if the dataset has no column `scene` or names a scene that is not there.

    Raises:
        ConfigError: The reward needs the plan of the previous frame.

    Example:
        >>> reward = as_trl_reward(build_reward([RewardSpec("pdms")]), {scene.token: scene for scene in scenes})
        >>> reward(prompts=[""], completions=[format_plan(plan)], scene=[scenes[0].token])
        [0.91]
    """
    computed = reward if isinstance(reward, Reward) else getattr(reward, "reward", None)
    if isinstance(computed, Reward) and computed.two_frame:
        raise ConfigError("A reward that needs the plan of the previous frame cannot score completions, one plan each.")
    service = LocalRewardService(reward) if isinstance(reward, Reward) else reward
    find = _finder(scenes)

    def score(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        if tokenizer is None:
            plans = [_plan_of_text(completion, parse) for completion in completions]
        elif completion_ids is None:
            raise DataError("A tokenizer is given but no completion_ids. Pass them, or leave the tokenizer out.")
        else:
            plans = [_plan_of_ids(ids, tokenizer, first_id) for ids in completion_ids]
        tokens = _scene_column(columns, len(completions))
        values, reasons, scores = _score(service, find, tokens, plans)
        _log(columns, name, values, reasons, scores)
        return values

    score.__name__ = name
    return score


def prompt_rows(scenes: Iterable[Scene], *, conversational: bool = False) -> list[dict[str, Any]]:
    """Rows of a dataset for TRL: `prompt`, what the policy may see as text, and `scene`, the token.

    Args:
        scenes: One row each, in order.
        conversational: Whether prompts are lists of messages, for models with a chat template.
    """
    rows = []
    for scene in scenes:
        text = scene_prompt(scene.observation)
        prompt: Any = [{"role": "user", "content": text}] if conversational else text
        rows.append({"prompt": prompt, "scene": scene.token})
    return rows


def _finder(scenes: Mapping[str, Scene] | SceneStore) -> Callable[[str], Scene]:
    """Scene by token."""
    places = {token: i for i, token in enumerate(scenes.tokens)} if isinstance(scenes, SceneStore) else {}

    def find(token: str) -> Scene:
        if isinstance(scenes, SceneStore):
            if token in places:
                return scenes[places[token]]
        elif token in scenes:
            return scenes[token]
        raise DataError(f"The dataset names scene {token!r}, which is not among the {len(scenes)} scenes given.")

    return find


def _scene_column(columns: Mapping[str, Any], count: int) -> list[str]:
    """The token of every row's scene."""
    tokens = columns.get("scene")
    if tokens is None:
        raise DataError("The dataset has no column 'scene' with the token of each prompt's scene. Use prompt_rows.")
    if len(tokens) != count:
        raise DataError(f"Column 'scene' has {len(tokens)} rows for {count} completions.")
    return [str(token) for token in tokens]


Plan = NDArray[np.float64] | str
"""Poses ``[8, 3]``, or why there are none."""


def _plan_of_text(completion: Any, parse: Parse) -> Plan:
    """The plan that a completion's text states; of messages, the last one's."""
    try:
        text = completion if isinstance(completion, str) else _content(completion[-1]["content"])
        poses = np.asarray(parse(text), dtype=np.float64)
    except DataError as error:
        return str(error)
    except (IndexError, KeyError, TypeError) as error:
        return f"the completion holds no text: {type(error).__name__}"
    return poses if poses.shape == (NUM_POSES, 3) else f"`parse` made a plan of shape {list(poses.shape)}"


def _content(content: Any) -> str:
    """A message's text, which may come in parts."""
    return content if isinstance(content, str) else "".join(str(part["text"]) for part in content if "text" in part)


def _plan_of_ids(ids: Sequence[int], tokenizer: TrajectoryTokenizer, first_id: int) -> Plan:
    """The plan of exactly L numeric tokens, before anything that is none (the end of the text)."""
    tokens = np.asarray([int(i) for i in ids], dtype=np.int64) - first_id
    numeric = (tokens >= 0) & (tokens < tokenizer.vocab_size)
    count = len(tokens) if numeric.all() else int(np.argmin(numeric))
    if count != tokenizer.length:
        return f"the completion starts with {count} numeric tokens; a plan has {tokenizer.length}"
    if numeric[count:].any():
        return "numeric tokens follow the end of the plan"
    plan: NDArray[np.float64] = tokenizer.decode(tokens[None, :count])[0]
    return plan


def _score(
    service: RewardService, find: Callable[[str], Scene], tokens: Sequence[str], plans: Sequence[Plan]
) -> tuple[list[float | None], list[str], Scores | None]:
    """Values, reasons (empty where scored) and the scores of the rows that have a plan, row by row."""
    used = {token: find(token) for token in dict.fromkeys(tokens)}
    place = {token: i for i, token in enumerate(used)}
    values: list[float | None] = [None] * len(plans)
    reasons = [plan if isinstance(plan, str) else "" for plan in plans]
    good = [row for row, plan in enumerate(plans) if not isinstance(plan, str)]
    if not good:
        return values, reasons, None
    poses = np.stack([np.asarray(plans[row], dtype=np.float64) for row in good])
    index = np.array([place[tokens[row]] for row in good])
    scores = service.score(list(used.values()), Trajectories(poses, index))
    for i, row in enumerate(good):
        if scores.valid[i]:
            values[row] = float(scores.total[i])
        else:
            reasons[row] = str(scores.failures[i])
    return values, reasons, scores


def _log(
    columns: Mapping[str, Any], name: str, values: Sequence[float | None], reasons: list[str], scores: Scores | None
) -> None:
    """Tell TRL how many rows were scored, the components' means, and why the others were not."""
    log_metric, log_extra = columns.get("log_metric"), columns.get("log_extra")
    if log_extra is not None:
        log_extra(f"{name}_failure", list(reasons))
    if log_metric is None:
        return
    scored = sum(value is not None for value in values)
    log_metric(f"{name}/valid_frac", scored / max(1, len(values)))
    if scores is None or not scores.valid.any():
        return
    for column in scores.names:
        found = scores.component(column)[scores.valid]
        if np.isfinite(found).any():
            log_metric(f"{name}/{column}", float(np.nanmean(found)))
