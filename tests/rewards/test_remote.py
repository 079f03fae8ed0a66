"""Remote rewards against servers on this machine that answer well, late, badly or not at all."""

from __future__ import annotations

import email.utils
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from oracles.loopback import Answer, Call, serve

from rewards import PDMS_COMPONENTS, LocalRewardService, RewardInputs, RewardSpec, ScorerInfo, build_reward
from rewards.http_client import HttpCallError, JsonClient
from rewards.partly_scored import PartlyScoredError
from rewards.remote import remote
from rewards.scorer import Scorer
from rlhf_drive.errors import ConfigError
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.generator import generate_scenes

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(generate_scenes(3, seed=1))


def inputs(scenes: list[Scene], index: list[int]) -> RewardInputs:
    """Rows whose plan ends at x = row."""
    poses = np.random.default_rng(0).normal(size=(len(index), 8, 3))
    poses[:, -1, 0] = np.arange(len(index))
    components = {"pdms": np.linspace(0.0, 1.0, len(index)), "ec": np.full(len(index), np.nan)}
    return RewardInputs(scenes, Trajectories(poses, np.array(index)), components)


def last_x(call: Call) -> Answer:
    """Every plan's last x."""
    return Answer({"version": 1, "rewards": [row["poses"][-1][0] for row in call.body["rows"]]})


def client(
    url: str, *, timeout_s: float = 5.0, retries: int = 3, backoff_s: float = 0.5
) -> tuple[JsonClient, list[float]]:
    """A client that notes its waits instead of waiting."""
    waits: list[float] = []
    made = JsonClient(url, timeout_s=timeout_s, retries=retries, backoff_s=backoff_s, sleep=waits.append)
    return made, waits


def test_request_holds_what_the_protocol_says(scenes: list[Scene]) -> None:
    given = inputs(scenes, [2, 2, 0])
    with serve(last_x) as server:
        values = remote(url=f"{server.url}/score")(given)
    assert values.tolist() == [0.0, 1.0, 2.0]
    (call,) = server.calls
    assert (call.path, call.headers["Content-Type"]) == ("/score", "application/json")
    assert "Authorization" not in call.headers
    body = call.body
    assert (body["version"], body["dt_s"]) == (1, 0.5)
    assert [row["scene"] for row in body["rows"]] == [0, 0, 1]
    assert [scene["token"] for scene in body["scenes"]] == [scenes[2].token, scenes[0].token]
    assert [row["poses"] for row in body["rows"]] == given.trajectories.poses.tolist()
    assert [row["components"] for row in body["rows"]] == [{"pdms": p, "ec": None} for p in (0.0, 0.5, 1.0)]
    assert "previous" not in body["rows"][0]
    seen = scenes[2].observation
    assert body["scenes"][0]["speed_mps"] == seen.speed_mps
    np.testing.assert_allclose(body["scenes"][0]["route"], seen.route_xy, atol=1e-4)
    np.testing.assert_allclose([a["state"] for a in body["scenes"][0]["agents"]], seen.agents[:, -1], atol=1e-4)
    assert "map" not in body["scenes"][0]


def test_how_much_of_the_scene_is_sent(scenes: list[Scene]) -> None:
    previous = Trajectories(np.ones((1, 8, 3)), np.zeros(1))
    given = RewardInputs(scenes, Trajectories(np.zeros((1, 8, 3)), np.zeros(1)), {}, previous)
    with serve(lambda call: Answer({"version": 1, "rewards": [0.5]})) as server:
        remote(url=server.url, observation="none")(given)
        remote(url=server.url, observation="full")(given)
    none, full = (call.body["scenes"][0] for call in server.calls)
    assert set(none) == {"token", "kind"}
    seen = scenes[0].observation
    assert [line["xy"] for line in full["map"]] == [
        np.round(seen.map_xy[a:b].astype(float), 4).tolist()
        for a, b in zip(seen.map_offsets[:-1], seen.map_offsets[1:], strict=True)
    ]
    missing = sum(state is None for states in full["agents_history"] for state in states)
    assert missing == int((~seen.agents_valid).sum())
    assert server.calls[0].body["rows"][0]["previous"] == np.ones((8, 3)).tolist()


def test_nothing_of_the_reference_is_sent(scenes: list[Scene]) -> None:
    changed = scenes[0].with_reference(human_poses=scenes[0].reference.human_poses + 1.0)
    with serve(last_x) as server:
        for scene in (scenes[0], changed):
            remote(url=server.url, observation="full")(inputs([scene], [0]))
    first, second = server.calls
    assert first.body == second.body


@pytest.mark.parametrize("concurrency", [1, 3])
def test_batches_come_back_in_order(scenes: list[Scene], concurrency: int) -> None:
    def last_first(call: Call) -> Answer:
        time.sleep(0.05 if call.body["rows"][0]["poses"][-1][0] == 0.0 else 0.0)
        return last_x(call)

    with serve(last_first) as server:
        values = remote(url=server.url, batch_size=3, concurrency=concurrency)(inputs(scenes, [0] * 5 + [1] * 3))
    assert values.tolist() == list(range(8))
    assert sorted(len(call.body["rows"]) for call in server.calls) == [2, 3, 3]
    assert {len(call.body["scenes"]) for call in server.calls} == {1, 2}  # rows 3..5 span two scenes


def test_requests_under_way_are_bounded(scenes: list[Scene]) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def busy(call: Call) -> Answer:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.03)
        with lock:
            now[0] -= 1
        return last_x(call)

    with serve(busy) as server:
        remote(url=server.url, batch_size=1, concurrency=2)(inputs(scenes, [0] * 8))
    assert most == [2]


def test_token_is_sent_and_never_shown(scenes: list[Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_TOKEN", "s3cret")
    with serve(lambda call: Answer({"error": "no"}, 403)) as server:
        reward = remote(url=f"{server.url}/a?key=k3y", token_env="SCORER_TOKEN")
        with pytest.raises(PartlyScoredError) as caught:
            reward(inputs(scenes, [0]))
    assert server.calls[0].headers["Authorization"] == "Bearer s3cret"
    assert server.calls[0].path == "/a?key=k3y"
    assert "s3cret" not in str(caught.value)
    assert "k3y" not in str(caught.value)
    monkeypatch.delenv("SCORER_TOKEN")
    with pytest.raises(ConfigError, match="environment variable SCORER_TOKEN is not set"):
        remote(url=server.url, token_env="SCORER_TOKEN")
    monkeypatch.setenv("SCORER_TOKEN", "two\nlines")
    with pytest.raises(ConfigError, match="holds text that no header can"):
        remote(url=server.url, token_env="SCORER_TOKEN")


def test_null_is_not_a_zero(scenes: list[Scene]) -> None:
    rewards = [0.25, None, None, 0, "1", True, 10**400]
    reasons = [None, "no map\n there", "", None, None, None, None]
    with (
        serve(lambda call: Answer({"version": 1, "rewards": rewards, "reasons": reasons})) as server,
        pytest.raises(PartlyScoredError) as caught,
    ):
        remote(url=server.url)(inputs(scenes, [0] * 7))
    np.testing.assert_array_equal(caught.value.values, [0.25, np.nan, np.nan, 0.0, np.nan, np.nan, np.nan])
    found = caught.value.failures
    assert {row: kind for row, (kind, _) in found.items()} == {
        1: "unavailable", 2: "unavailable", 4: "wrong_output", 5: "wrong_output", 6: "not_finite",
    }  # fmt: skip
    assert found[1][1] == f"{server.url} did not score it: no map there"
    assert found[2][1] == f"{server.url} did not score it"
    assert found[4][1] == f"{server.url} answered '1', not a number"


def test_one_bad_batch_costs_its_own_rows(scenes: list[Scene]) -> None:
    def second_fails(call: Call) -> Answer:
        return Answer(b"", 400) if call.body["rows"][0]["poses"][-1][0] == 2.0 else last_x(call)

    with serve(second_fails) as server, pytest.raises(PartlyScoredError) as caught:
        remote(url=server.url, batch_size=2)(inputs(scenes, [0] * 6))
    np.testing.assert_array_equal(caught.value.values, [0.0, 1.0, np.nan, np.nan, 4.0, 5.0])
    assert caught.value.failures[3] == ("unavailable", f"{server.url} answered 400 Bad Request")
    assert len(server.calls) == 3


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"<html>busy</html>", "not JSON .*: '<html>busy</html>'"),
        (b'{"version": 1, "rewards": [NaN, 1]}', "NaN is not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"", "not JSON"),
        ([0.5, 0.5], "version None of the protocol instead of 1"),
        ({"rewards": [0.5, 0.5]}, "version None of the protocol"),
        ({"version": 2, "rewards": [0.5, 0.5]}, "version 2 of the protocol"),
        ({"version": 1}, "no list `rewards` for 2 plans"),
        ({"version": 1, "rewards": [0.5]}, "1 rewards for 2 plans"),
        ({"version": 1, "rewards": [0.5, 0.5, 0.5]}, "3 rewards for 2 plans"),
        ({"version": 1, "rewards": [0.5, 0.5], "reasons": ["x"]}, "`reasons` that is not a list of 2"),
    ],
)
def test_answer_that_is_none(scenes: list[Scene], body: Any, match: str) -> None:
    with serve(lambda call: Answer(body)) as server, pytest.raises(PartlyScoredError, match=match) as caught:
        remote(url=server.url)(inputs(scenes, [0, 1]))
    assert np.isnan(caught.value.values).all()
    assert [kind for kind, _ in caught.value.failures.values()] == ["wrong_output"] * 2
    assert len(server.calls) == 1  # asking again would not help


def flaky(*statuses: int, headers: dict[str, str] | None = None) -> Callable[[Call], Answer]:
    """Answers with these statuses in turn, then well."""
    return lambda call: (
        Answer("busy", statuses[call.number], headers or {}) if call.number < len(statuses) else Answer(1)
    )


def test_server_errors_are_tried_again_with_doubled_waits() -> None:
    with serve(flaky(503, 500, 429)) as server:
        caller, waits = client(server.url)
        assert caller.post({}) == 1
    assert waits == [0.5, 1.0, 2.0]


def test_server_error_for_ever_is_given_up() -> None:
    with serve(flaky(*[502] * 9)) as server:
        caller, waits = client(server.url, retries=2)
        with pytest.raises(HttpCallError, match=r'answered 502 Bad Gateway: "busy" \(3 attempts\)') as caught:
            caller.post({})
    assert (caught.value.kind, len(server.calls), waits) == ("unavailable", 3, [0.5, 1.0])


@pytest.mark.parametrize("status", [400, 401, 404, 422, 302, 204])
def test_other_answers_are_final(status: int) -> None:
    with serve(flaky(status, headers={"Location": "/elsewhere"})) as server:
        caller, waits = client(server.url)
        with pytest.raises(HttpCallError, match=f"answered {status}"):
            caller.post({})
    assert (len(server.calls), waits) == (1, [])


def test_retry_after_is_obeyed_up_to_a_limit() -> None:
    with serve(flaky(429, 503, headers={"Retry-After": "7"})) as server:
        caller, waits = client(server.url)
        assert caller.post({}) == 1
    assert waits == [7.0, 7.0]
    date = email.utils.formatdate(time.time() + 20.0, usegmt=True)
    with serve(flaky(503, headers={"Retry-After": date})) as server:
        caller, waits = client(server.url)
        caller.post({})
    assert 17.0 < waits[0] <= 20.0
    for said, waited in (("soon", [0.5]), ("0", [0.5])):
        with serve(flaky(503, headers={"Retry-After": said})) as server:
            caller, waits = client(server.url)
            caller.post({})
        assert waits == waited
    with serve(flaky(503, headers={"Retry-After": "3600"})) as server:
        caller, waits = client(server.url)
        with pytest.raises(HttpCallError, match="1 attempt"):
            caller.post({})
    assert waits == []


def test_slow_answer_is_a_timeout() -> None:
    release = threading.Event()

    def hang(call: Call) -> Answer:
        release.wait(5.0)
        return Answer(1)

    with serve(hang) as server:
        caller, waits = client(server.url, timeout_s=0.15, retries=1)
        start = time.perf_counter()
        with pytest.raises(HttpCallError, match=r"did not answer within 0.15 s \(2 attempts\)") as caught:
            caller.post({})
        assert 0.3 <= time.perf_counter() - start < 5.0
        release.set()
    assert (caught.value.kind, waits, len(server.calls)) == ("timeout", [0.5], 2)


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-Long: "])
def test_answer_that_drips_is_a_timeout(start: bytes) -> None:
    """Every byte of the body, or of the header, comes in time; the whole does not."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(start)
            while not done.wait(0.05):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    caller, _ = client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.3, retries=0)
    began = time.perf_counter()
    with pytest.raises(HttpCallError, match=r"did not answer within 0\.3 s"):
        caller.post({})
    assert time.perf_counter() - began < 5.0
    done.set()
    thread.join()
    listener.close()


def test_nobody_there_and_a_line_that_breaks() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    caller, waits = client(f"http://127.0.0.1:{port}", retries=2)
    with pytest.raises(HttpCallError, match=r"cannot be reached: ConnectError.*\(3 attempts\)"):
        caller.post({})
    assert waits == [0.5, 1.0]
    with serve(lambda call: Answer(b"{", headers={"Content-Length": "9"}) if not call.number else Answer(1)) as server:
        caller, waits = client(server.url)
        assert caller.post({}) == 1
    assert waits == [0.5]


def test_proxy_does_not_stand_before_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serve(flaky()) as server:
        assert client(server.url, retries=0)[0].post({}) == 1


def test_client_can_be_closed_and_used_again() -> None:
    with serve(flaky()) as server:
        caller, _ = client(server.url)
        assert caller.post({}) == 1
        caller.close()
        assert caller.post({}) == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"url": "localhost:8000/score"}, "no http or https address"),
        ({"url": "ftp://host/score"}, "no http or https address"),
        ({"url": "http://"}, "no http or https address"),
        ({"url": "http://host:99999/"}, "url is no address"),
        ({"url": "http://[::1/"}, "url is no address"),
        ({"url": "http://me:pw@host/"}, "user name or password"),
        ({"url": "http://host/a b"}, "no http or https address"),
        ({"url": "http://host", "timeout_s": 0.0}, "timeout_s must be above 0"),
        ({"url": "http://host", "retries": -1}, "retries must be at least 0"),
        ({"url": "http://host", "backoff_s": -1.0}, "backoff_s must be at least 0"),
        ({"url": "http://host", "batch_size": 0}, "batch_size must be at least 1"),
        ({"url": "http://host", "concurrency": 0}, "concurrency must be at least 1"),
        ({"url": "http://host", "observation": "sumary"}, "Did you mean 'summary'"),
        ({}, r"options.url \(str\) is missing"),
    ],
)
def test_wrong_option_is_refused_when_the_recipe_is_read(options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        build_reward([RewardSpec("pdms"), RewardSpec("remote", 1.0, options)])
    assert str(caught.value).startswith("reward.terms[1].options")


def test_in_the_service_a_server_that_fails_costs_its_rows_and_is_not_asked_again(scenes: list[Scene]) -> None:
    def half(call: Call) -> Answer:
        first = call.body["rows"][0]["poses"][-1][0]
        return Answer("down", 500) if first == 2.0 else last_x(call)

    plans = inputs(scenes, [0, 0, 1, 1, 2, 2]).trajectories
    with serve(half) as server:
        options = {"url": server.url, "batch_size": 2, "retries": 1, "backoff_s": 0.0}
        reward = build_reward([RewardSpec("remote", 1.0, options)], scorer=f"{__file__}:ones")
        with LocalRewardService(reward, workers=1) as service:
            scores = service.score(scenes, plans)
    np.testing.assert_array_equal(scores.total, [0.0, 1.0, np.nan, np.nan, 4.0, 5.0])
    assert {row: failure.kind for row, failure in scores.failures.items()} == {2: "unavailable", 3: "unavailable"}
    expected = f"scene {scenes[1].token!r}: reward 'remote': {server.url} answered 500 Internal Server Error: "
    assert scores.failures[2].reason == expected + '"down" (2 attempts)'
    assert len(server.calls) == 4


def ones() -> Scorer:
    """A scorer that likes everything."""

    def score(prepared: object, poses: Any, previous: Any) -> dict[str, Any]:
        return {name: np.ones(len(poses)) for name in PDMS_COMPONENTS}

    return Scorer(ScorerInfo("ones", "1"), PDMS_COMPONENTS, lambda token, reference: None, score)
