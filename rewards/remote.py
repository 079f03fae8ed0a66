"""A reward that a server elsewhere computes: JSON over HTTP, documented in docs/rewards.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.carriers import RewardInputs
from rewards.http_client import HttpCallError, JsonClient, secret_from
from rewards.opened import opened_reward
from rewards.partly_scored import RowResult, gather_rows
from rewards.plan_text import command_word
from rewards.registry import BoundReward
from rlhf_drive.errors import ConfigError, did_you_mean
from rlhf_drive.scenes import AgentType, MapElement, Observation, Scene

__all__ = ["OBSERVATIONS", "PROTOCOL_VERSION", "remote"]

PROTOCOL_VERSION = 1
"""`version` of requests and answers."""
OBSERVATIONS = ("none", "summary", "full")
"""What of a scene's observation is sent: only its token and kind, what a scorer of motion needs, or all of it."""


@opened_reward("remote")
def remote(
    *,
    url: str,
    timeout_s: float = 10.0,
    retries: int = 2,
    backoff_s: float = 0.5,
    batch_size: int = 64,
    concurrency: int = 4,
    observation: str = "summary",
    token_env: str = "",
) -> BoundReward:
    """Values from a scoring server. What it does not score is left unscored, with its reason.

    Args:
        url: Where to post the plans.
        timeout_s: Time for one request.
        retries: Further attempts after a connection error, a timeout, 429 or 5xx.
        backoff_s: Wait before the second attempt; doubles with each.
        batch_size: Plans in one request.
        concurrency: Requests under way at once.
        observation: `none`, `summary` or `full` (`OBSERVATIONS`). What only the simulator may see is never sent.
        token_env: Environment variable with a bearer token; empty sends none.

    Raises:
        ConfigError: An option is out of range, `url` is no address, or the token is not there.
    """
    for name, value in (("batch_size", batch_size), ("concurrency", concurrency)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1; got {value}.")
    if observation not in OBSERVATIONS:
        raise ConfigError(f"Unknown observation {observation!r}. {did_you_mean(observation, OBSERVATIONS)}")
    token = secret_from(token_env, "token_env")
    client = JsonClient(url, timeout_s=timeout_s, retries=retries, backoff_s=backoff_s, token=token)

    def score(inputs: RewardInputs) -> NDArray[np.float64]:
        count = len(inputs.trajectories)
        batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]

        def ask(rows: range) -> list[RowResult]:
            try:
                return _read_answer(client.post(_request(inputs, rows, observation)), len(rows), client.name)
            except HttpCallError as error:
                return [(error.kind, error.reason)] * len(rows)

        if len(batches) < 2 or concurrency == 1:
            answers = [ask(rows) for rows in batches]
        else:
            with ThreadPoolExecutor(min(concurrency, len(batches)), thread_name_prefix="remote-reward") as pool:
                answers = list(pool.map(ask, batches))
        return gather_rows([result for answer in answers for result in answer])

    return score


def _request(inputs: RewardInputs, rows: range, observation: str) -> dict[str, Any]:
    """The request for `rows`: their scenes once each, and a row for every plan."""
    index = inputs.trajectories.scene_index[rows.start : rows.stop].tolist()
    place = {scene: i for i, scene in enumerate(dict.fromkeys(index))}
    items = []
    for row, scene in zip(rows, index, strict=True):
        item: dict[str, Any] = {
            "scene": place[scene],
            "poses": inputs.trajectories.poses[row].tolist(),
            "components": {name: _number(values[row]) for name, values in inputs.components.items()},
        }
        if inputs.previous is not None:
            item["previous"] = inputs.previous.poses[row].tolist()
        items.append(item)
    return {
        "version": PROTOCOL_VERSION,
        "dt_s": inputs.trajectories.dt_s,
        "scenes": [_scene(inputs.scenes[scene], observation) for scene in place],
        "rows": items,
    }


def _scene(scene: Scene, observation: str) -> dict[str, Any]:
    """A scene as the server sees it."""
    sent: dict[str, Any] = {"token": scene.token, "kind": scene.kind}
    if observation != "none":
        sent |= _summary(scene.observation)
    if observation == "full":
        sent |= _details(scene.observation)
    return sent


def _summary(seen: Observation) -> dict[str, Any]:
    """Own motion, command, route, and where the others are now."""
    kinds = [AgentType(int(kind)).name.lower() for kind in seen.agents_type]
    now = _rounded(seen.agents[:, -1])
    size = _rounded(seen.agents_size)
    return {
        "command": command_word(seen),
        "speed_mps": seen.speed_mps,
        "ego_history": _rounded(seen.ego_history),
        "route": _rounded(seen.route_xy),
        "agents": [
            {"type": kind, "state": state, "length": length, "width": width}
            for kind, state, (length, width) in zip(kinds, now, size, strict=True)
        ],
    }


def _details(seen: Observation) -> dict[str, Any]:
    """The others' past, and the map."""
    past = _rounded(seen.agents)
    lines = pairwise(seen.map_offsets.tolist())
    return {
        "agents_history": [
            [state if there else None for state, there in zip(states, valid, strict=True)]
            for states, valid in zip(past, seen.agents_valid.tolist(), strict=True)
        ],
        "map": [
            {
                "type": MapElement(int(seen.map_type[m])).name.lower(),
                "xy": _rounded(seen.map_xy[start:end]),
                "speed_limit_mps": _number(seen.map_speed_limit[m]) or None,
                "on_route": bool(seen.map_on_route[m]),
                "red": bool(seen.map_red[m]),
            }
            for m, (start, end) in enumerate(lines)
        ],
    }


def _rounded(values: NDArray[np.floating]) -> list[Any]:
    """Nested lists, to 0.1 mm."""
    return np.round(values.astype(np.float64), 4).tolist()  # type: ignore[no-any-return]


def _number(value: Any) -> float | None:
    """JSON has no NaN: what is not there is null."""
    return float(value) if math.isfinite(value) else None


def _read_answer(answer: Any, count: int, server: str) -> list[RowResult]:
    """Values and reasons by row out of a server's answer.

    Raises:
        HttpCallError: It is not an answer to this request.
    """

    def wrong(what: str) -> HttpCallError:
        return HttpCallError("wrong_output", f"{server} answered with {what}")

    if not isinstance(answer, Mapping) or answer.get("version") != PROTOCOL_VERSION:
        version = answer.get("version") if isinstance(answer, Mapping) else None
        raise wrong(f"version {version!r} of the protocol instead of {PROTOCOL_VERSION}")
    values, reasons = answer.get("rewards"), answer.get("reasons")
    if not isinstance(values, list) or len(values) != count:
        got = f"{len(values)} rewards" if isinstance(values, list) else "no list `rewards`"
        raise wrong(f"{got} for {count} plans")
    if reasons is not None and (not isinstance(reasons, list) or len(reasons) != count):
        raise wrong(f"`reasons` that is not a list of {count}")
    return [_row(value, reason, server) for value, reason in zip(values, reasons or [None] * count, strict=True)]


def _row(value: object, reason: object, server: str) -> RowResult:
    if value is None:
        said = f": {' '.join(reason.split())[:200]}" if isinstance(reason, str) and reason.strip() else ""
        return "unavailable", f"{server} did not score it{said}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "wrong_output", f"{server} answered {value!r:.60}, not a number"
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    return number if math.isfinite(number) else ("not_finite", f"{server} answered {number}")
