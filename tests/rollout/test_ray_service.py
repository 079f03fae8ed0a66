"""Sampling on Ray: what comes out is what the in-process engine gives, whatever happens to the workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.adapted_policy import adapted, make
from torch import Tensor

from rlhf_drive.errors import ConfigError, RolloutError
from rlhf_drive.policies import Decoding, Policy
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.generator import generate_scenes
from rlhf_drive.scenes.previous import previous_scene
from rollout import LocalRolloutService, RayRolloutService, Rollout

ray: Any = pytest.importorskip("ray")
pytestmark = pytest.mark.ray

DECODING = Decoding(4, "random", 1.0, 0)
CHUNK = 3
TIMEOUT_S = 12.0
WAIT_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As many threads as a worker has: numbers then agree to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make()


def learn(policy: Policy, seed: int) -> None:
    """Change the weights, as training might."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(generate_scenes(12, seed=3))


@pytest.fixture(scope="module")
def engine(policy: Policy) -> Iterator[RayRolloutService]:
    """Four workers on a Ray that the service starts itself, and that is gone with all it started at the end."""
    assert not ray.is_initialized()
    before = children()
    service = RayRolloutService(policy, seed=5, workers=4, timeout_s=TIMEOUT_S, address="local", chunk_mb=1)
    started = children() - before
    assert len(started) >= 2  # Ray's own processes
    yield service
    workers = {worker.pid for worker in service.workers}
    service.close()
    assert not ray.is_initialized()
    assert {pid for pid in started | workers if state_of(pid) not in (None, "Z")} == set()
    with pytest.raises(RolloutError, match="closed"):
        service.push_weights(policy, 1)


def state_of(pid: int) -> str | None:
    """State of a process: Z where it has ended, T where it is stopped; None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def children() -> set[int]:
    """Processes that this one has started."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parts = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(parts[1]) == os.getpid() and parts[0] != "Z":
            found.add(int(stat.parent.name))
    return found


def same(found: Rollout, expected: Rollout) -> None:
    """Bit for bit, in every field."""
    assert (found.scene_tokens, found.num_generations) == (expected.scene_tokens, expected.num_generations)
    assert found.versions == expected.versions
    assert torch.equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.trajectories.poses, expected.trajectories.poses)
    np.testing.assert_array_equal(found.trajectories.scene_index, expected.trajectories.scene_index)
    for field in fields(expected.trace):
        ours, theirs = getattr(found.trace, field.name), getattr(expected.trace, field.name)
        if isinstance(theirs, Tensor):
            assert ours.dtype == theirs.dtype, field.name
            assert torch.equal(ours, theirs), field.name
        else:
            assert ours == theirs, field.name


def submit_all(service: RayRolloutService, scenes: Sequence[Scene], step: int) -> list[Future[Rollout]]:
    return [
        service.submit(scenes[first : first + CHUNK], 4, DECODING, step=step, keep_experts=True)
        for first in range(0, len(scenes), CHUNK)
    ]


def locally(policy: Policy, scenes: Sequence[Scene], step: int, version: int) -> list[Rollout]:
    local = LocalRolloutService(policy, seed=5)
    local.push_weights(policy, version)
    return [
        local.sample(scenes[first : first + CHUNK], 4, DECODING, step=step, keep_experts=True)
        for first in range(0, len(scenes), CHUNK)
    ]


def check(service: RayRolloutService, policy: Policy, scenes: Sequence[Scene], step: int, version: int) -> None:
    futures = submit_all(service, scenes, step)
    for future, expected in zip(futures, locally(policy, scenes, step, version), strict=True):
        same(future.result(WAIT_S), expected)


@pytest.fixture(scope="module")
def one(engine: RayRolloutService, policy: Policy) -> Iterator[RayRolloutService]:
    """One worker on the Ray that the other service has started, which stays when this one is closed."""
    service = RayRolloutService(policy, seed=5, workers=1, cpus_per_worker=0.5, timeout_s=3.0, chunk_mb=1)
    yield service
    (pid,) = (worker.pid for worker in service.workers)
    service.close()
    assert state_of(pid) in (None, "Z")
    assert ray.is_initialized()


def test_one_worker_four_workers_and_the_local_engine_sample_the_same(
    engine: RayRolloutService, one: RayRolloutService, policy: Policy, scenes: list[Scene]
) -> None:
    bare: list[Any] = [replace(scene, reference=None) for scene in scenes]  # what a policy may not see is not sent
    before = [previous_scene(scene) for scene in scenes]
    for service in (engine, one):
        check(service, policy, bare, step=1, version=0)  # without a push: the weights it was started with
        check(service, policy, before, step=2, version=0)
        learn(policy, 0)
        service.push_weights(policy, 3)
        check(service, policy, scenes, step=2, version=3)
        policy.load_state_dict(make().state_dict())
    assert (one.stats.workers, one.stats.rollouts, len(one.workers)) == (1, 144, 1)
    stats = engine.stats
    assert (stats.workers, stats.restarts, stats.retries, stats.queued, len(engine.workers)) == (4, 0, 0, 0, 4)
    assert stats.busy_s > 0.0


def test_several_threads_submit_at_once(engine: RayRolloutService, policy: Policy, scenes: list[Scene]) -> None:
    engine.push_weights(policy, 6)
    found: dict[int, list[Rollout]] = {}

    def ask(step: int) -> None:
        found[step] = [future.result(WAIT_S) for future in submit_all(engine, scenes, step)]

    threads = [threading.Thread(target=ask, args=(step,)) for step in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    for step in range(4):
        for ours, theirs in zip(found[step], locally(policy, scenes, step, 6), strict=True):
            same(ours, theirs)


def test_worker_killed_while_it_samples_costs_nothing(
    engine: RayRolloutService, policy: Policy, scenes: list[Scene]
) -> None:
    engine.push_weights(policy, 7)
    check(engine, policy, scenes, step=5, version=7)
    before, pid = engine.stats, engine.workers[2].pid
    os.kill(pid, signal.SIGSTOP)  # so that it is surely not done with its chunk
    futures = submit_all(engine, scenes, 6) + submit_all(engine, scenes, 7)
    expected = locally(policy, scenes, 6, 7) + locally(policy, scenes, 7, 7)
    deadline = time.monotonic() + WAIT_S
    while sum(not future.done() for future in futures) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert sum(not future.done() for future in futures) == 1  # the one that is held up
    os.kill(pid, signal.SIGKILL)
    for future, wanted in zip(futures, expected, strict=True):
        same(future.result(WAIT_S), wanted)
    after = engine.stats
    assert (after.restarts - before.restarts, after.retries - before.retries) == (1, 1)
    assert after.rollouts - before.rollouts == 96
    assert pid not in [worker.pid for worker in engine.workers]


def test_worker_that_hangs_is_replaced_after_its_time(
    one: RayRolloutService, policy: Policy, scenes: list[Scene]
) -> None:
    one.push_weights(policy, 4)
    check(one, policy, scenes[:3], step=8, version=4)
    pid, before, started = one.workers[0].pid, one.stats, time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    check(one, policy, scenes[:3], step=9, version=4)
    assert time.monotonic() - started > 3.0
    assert (one.stats.restarts - before.restarts, one.stats.retries - before.retries) == (1, 1)
    deadline = time.monotonic() + 20.0  # Ray ends it when it comes to it
    while state_of(pid) not in (None, "Z") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert state_of(pid) in (None, "Z")


def test_errors_of_the_policy_keep_their_type_and_say_where(
    engine: RayRolloutService, scenes: list[Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    impossible = Decoding(4, "all", 1.0, 0)
    with pytest.raises(ConfigError) as here:
        engine.sample(scenes[:2], 2, impossible, step=0)
    monkeypatch.setattr(type(engine.policy.process), "check", lambda *_: None)  # here, not on the worker
    future = engine.submit(scenes[:2], 2, impossible, step=0)
    with pytest.raises(ConfigError) as there:
        future.result(WAIT_S)
    assert str(there.value) == str(here.value)
    (note,) = there.value.__notes__
    assert any(f"({worker.host}, process {worker.pid})" in note for worker in engine.workers)


def test_what_cannot_be_is_refused_at_once(engine: RayRolloutService, policy: Policy) -> None:
    with pytest.raises(ConfigError, match=r"Weights of another policy were pushed.*lora\.rank: 4 there, nothing here"):
        engine.push_weights(adapted(), 9)
    with pytest.raises(ConfigError, match="2 rollout workers with 100 GPUs each need 200; this machine has"):
        RayRolloutService(policy, seed=0, workers=2, gpus_per_worker=100.0)
    for options, match in (
        ({"workers": 0}, "workers of the rollout service must be at least 1; got 0"),
        ({"workers": 1, "timeout_s": float("nan")}, "timeout_s of the rollout service must be at least 0; got nan"),
        ({"workers": 1, "placement": "pile"}, "Unknown ray.placement 'pile'"),
    ):
        with pytest.raises(ConfigError, match=match):
            RayRolloutService(policy, seed=0, **options)  # type: ignore[arg-type]
    assert ray.is_initialized()


def store_bytes() -> float:
    """What Ray's object store holds just now."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return float(get_memory_info_reply(state).store_stats.object_store_bytes_used)


def test_old_weights_leave_the_object_store(engine: RayRolloutService, policy: Policy, scenes: list[Scene]) -> None:
    size = sum(weight.numel() * weight.element_size() for weight in policy.state_dict().values())
    for version in range(11, 61):
        engine.push_weights(policy, version)
        future = engine.submit(scenes[:1], 2, DECODING, step=version)
        if version % 10 == 0:
            future.result(WAIT_S)
            deadline = time.monotonic() + 10.0  # Ray frees soon what nobody refers to, not at once
            while not 1.0 <= store_bytes() / size < 2.5:
                assert time.monotonic() < deadline
                time.sleep(0.05)
