"""The judge against a stand-in that speaks the chat protocol and answers by what it is shown."""

from __future__ import annotations

import base64
import hashlib
import io
import threading
import time
from typing import Any

import numpy as np
import pytest
from oracles.loopback import Answer, Call, serve
from PIL import Image

from rewards import RewardInputs, RewardSpec, build_reward
from rewards.partly_scored import PartlyScoredError
from rewards.plan_text import format_plan
from rewards.vlm_judge import RUBRIC, read_score, vlm_judge
from rlhf_drive.errors import ConfigError
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.generator import generate_scenes
from rlhf_drive.scenes.observed_picture import draw_observation

PX = 128


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(generate_scenes(2, seed=5))


def inputs(scenes: list[Scene], index: list[int], y: list[float] | None = None) -> RewardInputs:
    """Straight plans, each moved sideways by its `y`."""
    poses = np.zeros((len(index), 8, 3))
    poses[:, :, 0] = 2.0 * np.arange(1, 9)
    poses[:, :, 1] = np.array(y if y is not None else range(len(index)))[:, None]
    return RewardInputs(scenes, Trajectories(poses, np.array(index)), {})


def picture_of(call: Call) -> bytes:
    """The PNG in a question."""
    url = call.body["messages"][1]["content"][1]["image_url"]["url"]
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return base64.b64decode(data, validate=True)


def grade(png: bytes) -> int:
    """A score that only who has the picture can give."""
    return hashlib.sha256(png).digest()[0] % 11


def reply(text: Any) -> Answer:
    """A chat completion."""
    message = {"role": "assistant", "content": text}
    return Answer({"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})


def by_picture(call: Call) -> Answer:
    return reply(f'The plan keeps its lane.\n```json\n{{"score": {grade(picture_of(call))}}}\n```')


def judge(url: str, **options: Any) -> Any:
    return vlm_judge(**{"base_url": url, "model": "driver", "size_px": PX, "backoff_s": 0.0} | options)


def expected(given: RewardInputs) -> list[float]:
    plans = given.trajectories
    return [
        grade(draw_observation(given.scenes[s].observation, poses, size_px=PX)) / 10
        for s, poses in zip(plans.scene_index, plans.poses, strict=True)
    ]


def test_score_is_that_of_the_picture(scenes: list[Scene]) -> None:
    given = inputs(scenes, [0, 0, 1, 1, 1])
    with serve(by_picture) as server:
        values = judge(server.url)(given)
    assert values.tolist() == expected(given)
    assert len(set(values.tolist())) > 1


def test_question_follows_the_protocol(scenes: list[Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "k-123")
    given = inputs(scenes, [1])
    with serve(by_picture) as server:
        judge(f"{server.url}/v1/", api_key_env="JUDGE_KEY", max_tokens=77)(given)
    (call,) = server.calls
    assert (call.path, call.headers["Authorization"]) == ("/v1/chat/completions", "Bearer k-123")
    body = call.body
    assert {k: body[k] for k in body if k != "messages"} == {"model": "driver", "max_tokens": 77, "temperature": 0}
    system, user = body["messages"]
    assert system == {"role": "system", "content": RUBRIC}
    assert (user["role"], [part["type"] for part in user["content"]]) == ("user", ["text", "image_url"])
    assert format_plan(given.trajectories.poses[0]) in user["content"][0]["text"]
    assert f"{scenes[1].observation.speed_mps:.1f} m/s" in user["content"][0]["text"]
    assert Image.open(io.BytesIO(picture_of(call))).size == (PX, PX)


def test_address_with_and_without_v1(scenes: list[Scene]) -> None:
    with serve(by_picture) as server:
        for base in ("", "/", "/v1", "/proxy/v1/"):
            judge(server.url + base)(inputs(scenes, [0]))
    paths = [call.path for call in server.calls]
    assert paths == ["/v1/chat/completions"] * 3 + ["/proxy/v1/chat/completions"]


def test_judge_sees_neither_the_human_nor_the_future(scenes: list[Scene]) -> None:
    reference = scenes[0].reference
    changed = scenes[0].with_reference(
        human_poses=reference.human_poses + 5.0,
        agent_pose=reference.agent_pose + np.linspace(0, 30, reference.agent_pose.shape[1])[:, None],
        red_active=~reference.red_active,
    )
    with serve(by_picture) as server:
        for scene in (scenes[0], changed):
            judge(server.url)(inputs([scene], [0]))
    assert server.calls[0].body == server.calls[1].body


def test_own_rubric(scenes: list[Scene]) -> None:
    with serve(by_picture) as server:
        judge(server.url, rubric='Say {"score": 5}.')(inputs(scenes, [0]))
    assert server.calls[0].body["messages"][0]["content"] == 'Say {"score": 5}.'


def test_same_question_is_asked_once(scenes: list[Scene]) -> None:
    with serve(by_picture) as server:
        reward = judge(server.url)
        first = reward(inputs(scenes, [0, 0, 0, 1], [1.0, 1.0, 2.0, 1.0]))
        assert len(server.calls) == 3
        assert first[0] == first[1]
        again = reward(inputs(scenes, [1, 0, 0], [1.0, 2.0, 3.0]))
        assert len(server.calls) == 4
    assert again[:2].tolist() == [first[3], first[2]]


def test_failure_is_not_remembered(scenes: list[Scene]) -> None:
    with serve(lambda call: by_picture(call) if call.number else reply("Hmm.")) as server:
        reward = judge(server.url)
        with pytest.raises(PartlyScoredError):
            reward(inputs(scenes, [0]))
        assert reward(inputs(scenes, [0])).tolist() == expected(inputs(scenes, [0]))


def test_questions_under_way_are_bounded(scenes: list[Scene]) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def busy(call: Call) -> Answer:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.15)
        with lock:
            now[0] -= 1
        return by_picture(call)

    with serve(busy) as server:
        judge(server.url, concurrency=2)(inputs(scenes, [0] * 6))
    assert most == [2]


def test_row_without_a_clear_score_has_a_reason(scenes: list[Scene]) -> None:
    given = inputs(scenes, [0] * 5)
    texts = ['{"score": 7.5}', "I cannot say.", None, '{"score": 11}', '{"score": 3} or {"score": 4}']
    order = {format_plan(poses): text for poses, text in zip(given.trajectories.poses, texts, strict=True)}

    def answer(call: Call) -> Answer:
        return reply(order[call.body["messages"][1]["content"][0]["text"].rpartition("0.5 s: ")[2]])

    with serve(answer) as server, pytest.raises(PartlyScoredError) as caught:
        judge(server.url)(given)
    np.testing.assert_array_equal(caught.value.values, [0.75, np.nan, np.nan, np.nan, np.nan])
    found = caught.value.failures
    assert {kind for kind, _ in found.values()} == {"wrong_output"}
    assert "which ends: 'I cannot say.'" in found[1][1]
    assert "no chat completion with text" in found[2][1]
    assert "no number from 0 to 10" in found[3][1]
    assert "several scores" in found[4][1]


def test_service_that_fails_is_a_reason(scenes: list[Scene]) -> None:
    with (
        serve(lambda call: Answer({"error": "no such model"}, 404)) as server,
        pytest.raises(PartlyScoredError) as gone,
    ):
        judge(server.url)(inputs(scenes, [0]))
    assert gone.value.failures[0][0] == "unavailable"
    assert '404 Not Found: {"error": "no such model"}' in gone.value.failures[0][1]
    with serve(lambda call: by_picture(call) if call.number else Answer("", 503)) as server:
        assert judge(server.url)(inputs(scenes, [0])).tolist() == expected(inputs(scenes, [0]))


def test_plan_too_far_to_write_is_a_reason(scenes: list[Scene]) -> None:
    with serve(by_picture) as server, pytest.raises(PartlyScoredError) as caught:
        judge(server.url)(inputs(scenes, [0, 0], [0.0, 1e6]))
    assert np.isfinite(caught.value.values).tolist() == [True, False]
    assert caught.value.failures[1][0] == "invalid_plan"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"score": 0}', 0.0),
        ('{"score": 10.0}', 10.0),
        ('{"why": "gap {small}", "score": 6.25, "parts": [1, 2]} Good luck.', 6.25),
        ('<think>maybe {"score": 1}</think>{"score": 9}', 9.0),
        ('maybe {"score": 1}</think>{"score": 9}', 9.0),
        ('{"score": 4}, as said: {"score": 4.0}', 4.0),
        ('{ not json } {"score": 2}', 2.0),
    ],
)
def test_score_is_read_out_of_text(text: str, score: float) -> None:
    assert read_score(text) == score


@pytest.mark.parametrize(
    "text",
    [
        "", "8", "score: 8", '{"score": "8"}', '{"score": true}', '{"score": null}', '{"score": NaN}', '{"score": -1}',
        '{"score": 10.01}', '{"score": 1e999}', '{"grade": 8}', '{"score": 8', '<think>{"score": 8}',
        '{"a": {"score": 8}}',
        '{"score": [8]}', '{"score": 8} {"score": "9"}', "{" * 50_000,
    ],
)  # fmt: skip
def test_text_without_a_score_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="score"):
        read_score(text)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"base_url": "localhost:8000"}, "no http or https address"),
        ({"model": ""}, "model is empty"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"size_px": 10}, "size_px must be at least 64"),
        ({"api_key_env": "NO_SUCH_KEY_HERE"}, "NO_SUCH_KEY_HERE is not set"),
    ],
)
def test_wrong_option_is_refused_when_the_recipe_is_read(options: dict[str, object], match: str) -> None:
    good = {"base_url": "http://localhost:8000/v1", "model": "driver"}
    with pytest.raises(ConfigError, match=match):
        build_reward([RewardSpec("pdms"), RewardSpec("vlm_judge", 0.1, good | options)])


def test_judge_may_only_accompany() -> None:
    spec = RewardSpec("vlm_judge", 1.0, {"base_url": "http://localhost:8000/v1", "model": "driver"})
    with pytest.raises(ConfigError, match="'vlm_judge' may only accompany another reward"):
        build_reward([spec])
    assert build_reward([RewardSpec("pdms"), spec]).names[-1] == "vlm_judge"
