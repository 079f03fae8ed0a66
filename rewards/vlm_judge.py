"""A vision-language model as judge: it sees the observation and the plan from above and says how well it drives.

Speaks the OpenAI chat protocol, which vLLM, SGLang and hosted models serve. It may only accompany another reward: a
judge alone is easily fooled, and two of its answers need not agree.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from rewards.carriers import RewardInputs
from rewards.http_client import HttpCallError, JsonClient, check_url, secret_from
from rewards.opened import opened_reward
from rewards.partly_scored import RowResult, gather_rows
from rewards.plan_text import command_word, format_plan
from rewards.registry import BoundReward
from rlhf_drive.errors import ConfigError, DataError
from rlhf_drive.scenes import Observation

__all__ = ["RUBRIC", "read_score", "vlm_judge"]

RUBRIC = (
    "You judge the plan of a self-driving car for its next 4 seconds. The picture shows the situation from above, "
    "forward is up. Dark box: the car, dotted: its past. Blue line: the plan, a dot every 0.5 s, its outlined box at "
    "the end. Other boxes: road users now, each with a line for its past (grey vehicles, magenta pedestrians, teal "
    "bicycles, brown obstacles). Bands: lanes, pale blue on the route, red where a red light holds. Grey lines: road "
    "edges. Consider in this order: collisions or close calls, leaving the road or the right lane, red lights, "
    "progress along the route, comfort. 10 is how an attentive, courteous expert would drive, 5 is poor but safe, "
    '0 is a crash. Think briefly, then end with one line of JSON: {"score": <number from 0 to 10>}'
)
"""The question that goes with every picture."""
_CACHE_SIZE = 65536
_MOST_TEXT = 20_000


@opened_reward("vlm_judge", auxiliary=True)
def vlm_judge(
    *,
    base_url: str,
    model: str,
    api_key_env: str = "",
    timeout_s: float = 60.0,
    retries: int = 2,
    backoff_s: float = 1.0,
    max_tokens: int = 512,
    concurrency: int = 8,
    size_px: int = 512,
    rubric: str = "",
) -> BoundReward:
    """A judge's score of 0 … 10, divided by 10. An answer without one clear score leaves the row unscored.

    The judge sees what the policy sees and the plan; the human's drive and the others' future are not shown.
    Temperature is 0, and a question that was answered before is not asked again.

    Args:
        base_url: Address of the service up to `/v1`, such as ``http://localhost:8000/v1``.
        model: Name of the model there.
        api_key_env: Environment variable with the key; empty sends none.
        timeout_s: Time for one answer.
        retries: Further attempts after a connection error, a timeout, 429 or 5xx.
        backoff_s: Wait before the second attempt; doubles with each.
        max_tokens: Length of an answer at most.
        concurrency: Questions under way at once.
        size_px: Edge length of the picture.
        rubric: Replaces :data:`RUBRIC`; must ask for ``{"score": 0 … 10}``.

    Raises:
        ConfigError: An option is out of range, the address is none, or the key is not there.
    """
    for name, value, least in (
        ("max_tokens", max_tokens, 1),
        ("concurrency", concurrency, 1),
        ("size_px", size_px, 64),
    ):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}; got {value}.")
    if not model:
        raise ConfigError("model is empty; name the model that the service serves.")
    client = JsonClient(
        _endpoint(base_url),
        timeout_s=timeout_s, retries=retries, backoff_s=backoff_s, token=secret_from(api_key_env, "api_key_env"),
    )  # fmt: skip
    judge = _Judge(client, model, max_tokens, size_px, rubric or RUBRIC)

    def score(inputs: RewardInputs) -> NDArray[np.float64]:
        return gather_rows(judge.judge(inputs, concurrency))

    return score


def _endpoint(base_url: str) -> str:
    """Address of chat completions; a bare host gets `/v1` as every such service has it."""
    parts = urlsplit(check_url(base_url))
    path = parts.path.rstrip("/") or "/v1"
    return parts._replace(path=f"{path}/chat/completions", fragment="").geturl()


@dataclass
class _Judge:
    """The service, what it is asked, and what it answered before."""

    client: JsonClient
    model: str
    max_tokens: int
    size_px: int
    rubric: str

    def __post_init__(self) -> None:
        self._drawing, self._remembering = threading.Lock(), threading.Lock()
        self._answers: dict[bytes, float] = {}

    def judge(self, inputs: RewardInputs, concurrency: int) -> list[RowResult]:
        """Score or reason of every row; pictures are drawn while earlier questions are under way."""
        seen = [_digest(scene.observation) for scene in inputs.scenes]
        plans = inputs.trajectories
        keys = [(seen[scene] + poses.tobytes()) for scene, poses in zip(plans.scene_index, plans.poses, strict=True)]
        with self._remembering:
            found: dict[bytes, RowResult] = {key: self._answers[key] for key in keys if key in self._answers}
        asked: dict[bytes, Future[RowResult]] = {}
        with ThreadPoolExecutor(concurrency, thread_name_prefix="vlm-judge") as pool:
            for key, scene, poses in zip(keys, plans.scene_index, plans.poses, strict=True):
                if key in found or key in asked:
                    continue
                try:
                    question = self._question(inputs.scenes[scene].observation, poses)
                except DataError as error:
                    found[key] = "invalid_plan", str(error)
                else:
                    asked[key] = pool.submit(self._ask, question)
        found |= {key: answer.result() for key, answer in asked.items()}
        with self._remembering:
            self._answers |= {key: value for key, value in found.items() if isinstance(value, float)}
            for key in list(self._answers)[: max(0, len(self._answers) - _CACHE_SIZE)]:
                del self._answers[key]
        return [found[key] for key in keys]

    def _question(self, seen: Observation, poses: NDArray[np.float64]) -> dict[str, Any]:
        """The request's body."""
        from rlhf_drive.scenes.observed_picture import draw_observation, observation_window

        with self._drawing:  # matplotlib shares its fonts between pictures
            picture = base64.b64encode(draw_observation(seen, poses, size_px=self.size_px)).decode()
        text = (
            f"The car drives at {seen.speed_mps:.1f} m/s; command: {command_word(seen)}. The picture shows a square of "
            f"{observation_window(poses).side:.0f} m. The plan as `x y heading` every 0.5 s: {format_plan(poses)}"
        )
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        return {
            "model": self.model,
            "messages": [
                {"role": "system", "content": self.rubric},
                {"role": "user", "content": [{"type": "text", "text": text}, image]},
            ],
            "max_tokens": self.max_tokens,
            "temperature": 0,
        }

    def _ask(self, question: dict[str, Any]) -> RowResult:
        """The judge's score in 0..1, or why there is none."""
        try:
            return read_score(_text(self.client.post(question))) / 10.0
        except HttpCallError as error:
            return error.kind, f"judge: {error.reason}"
        except ValueError as error:
            return "wrong_output", f"judge: {error}"


def _digest(seen: Observation) -> bytes:
    """Stands for everything in an observation that a question depends on."""
    parts = [value.tobytes() for value in vars(seen).values() if isinstance(value, np.ndarray)]
    shapes = [value.shape for value in vars(seen).values() if isinstance(value, np.ndarray)]
    return hashlib.sha256(b"".join([repr((seen.command, shapes)).encode(), *parts])).digest()


def _text(reply: Any) -> str:
    """The answer's text out of a chat completion.

    Raises:
        ValueError: There is none.
    """
    try:
        content = reply["choices"][0]["message"]["content"]
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part.get("type") == "text")
    except (KeyError, IndexError, TypeError, AttributeError):
        content = None
    if not isinstance(content, str):
        raise ValueError("the reply is no chat completion with text (`choices[0].message.content`)")
    return content


def read_score(text: str) -> float:
    """The score that `text` states as JSON, ``{"score": 7.5}``; text around it does not matter.

    Raises:
        ValueError: It states none, one that is no number in 0 … 10, or several that differ.

    Example:
        >>> read_score('The gap is small. {"score": 6.5}')
        6.5
    """
    answer = text.rpartition("</think>")[2].partition("<think>")[0][-_MOST_TEXT:]
    decoder = json.JSONDecoder()
    scores: list[object] = []
    place = answer.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(answer, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            scores += [value["score"]] if isinstance(value, Mapping) and "score" in value else []
        place = answer.find("{", end)
    shown = " ".join(text.split())[-120:]
    if not scores:
        raise ValueError(f'no {{"score": …}} in the answer, which ends: {shown!r}')
    if any(isinstance(s, bool) or not isinstance(s, int | float) or not 0 <= s <= 10 for s in scores):
        raise ValueError(f"score {scores!r:.60} is no number from 0 to 10")
    if len(set(scores)) > 1:
        raise ValueError(f"the answer states several scores: {scores!r:.60}")
    return float(cast(float, scores[0]))
