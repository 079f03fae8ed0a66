"""What a worker does, in this process: it is the in-process engine, with the weights that the call asks for."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles.adapted_policy import SETTINGS, adapted, make, move

from rlhf_drive.errors import ConfigError
from rlhf_drive.policies import Decoding, Policy, add_lora
from rlhf_drive.policies.checkpoints import describe_policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.generator import generate_scenes
from rlhf_drive.workers import WorkerLostError
from rollout import LocalRolloutService, ray_worker
from rollout.ray_worker import RolloutWorker, WorkerOptions
from rollout.transport import SampleCall, SentScene
from rollout.weights import SentWeights, WeightSender, named_weights


def decoding_of(policy: Policy) -> Decoding:
    return Decoding(4, "all" if policy.process.name == "flow" else "random", 1.0, 0)


class Ray:
    """An object store in this process, in place of the package ray."""

    class exceptions:  # noqa: N801
        RayError = OSError
        GetTimeoutError = TimeoutError

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.error: Exception | None = None

    def get(self, references: list[bytes], *, timeout: float) -> list[Any]:
        if self.error is not None:
            raise self.error
        self.asked.append(sum(len(reference) for reference in references))
        return [pickle.loads(reference) for reference in references]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ray]:
    fake, threads = Ray(), torch.get_num_threads()
    monkeypatch.setattr(ray_worker, "import_ray", lambda: fake)
    yield fake
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(generate_scenes(5, seed=3))


def worker_of(policy: Policy, **options: Any) -> RolloutWorker:
    settings = {"precision": None, "seed": 5, "max_rows": 2048, "num_cpus": 1.0, "num_gpus": 0.0}
    worker = RolloutWorker(WorkerOptions(describe_policy(policy), **(settings | options)))
    worker.start()
    return worker


def call_of(policy: Policy, scenes: list[Scene], step: int = 1) -> SampleCall:
    rows = FeatureCache().rows(policy, scenes)
    sent = tuple(SentScene(scene.token, row) for scene, row in zip(scenes, rows, strict=True))
    return SampleCall(sent, 4, decoding_of(policy), step, keep_experts=True)


def expected(policy: Policy, scenes: list[Scene], step: int = 1, **options: Any) -> Any:
    local = LocalRolloutService(policy, seed=5, **options)
    return local.sample(scenes, 4, decoding_of(policy), step=step, keep_experts=True)


def check(worker: RolloutWorker, policy: Policy, weights: SentWeights, scenes: list[Scene], **options: Any) -> None:
    found = worker.sample(weights, call_of(policy, scenes))
    rollout, wanted = found.rollout.unpacked(torch.device("cpu")), expected(policy, scenes, **options)
    assert (found.number, rollout.versions) == (weights.number, (weights.version,) * len(scenes))
    assert torch.equal(rollout.tokens, wanted.tokens)
    assert torch.equal(rollout.trace.logp, wanted.trace.logp)
    assert torch.equal(rollout.trace.experts, wanted.trace.experts)


@pytest.mark.parametrize("make_policy", [make, adapted, lambda: make(process="flow")])
def test_plans_are_those_of_the_local_engine(ray: Ray, scenes: list[Scene], make_policy: Callable[[], Policy]) -> None:
    policy = make_policy()
    check(worker_of(policy), policy, WeightSender(pickle.dumps, 10_000).send(policy, 7), scenes)


def test_batches_above_the_limit_are_cut_as_by_the_local_engine(ray: Ray, scenes: list[Scene]) -> None:
    policy = make()
    weights = WeightSender(pickle.dumps, 10_000).send(policy, 7)
    check(worker_of(policy, max_rows=8), policy, weights, scenes, max_rows=8)


def test_worker_takes_what_it_lacks_before_it_samples(ray: Ray, scenes: list[Scene]) -> None:
    policy = adapted()
    sender, worker = WeightSender(pickle.dumps, 10**6), worker_of(policy)
    first = sender.send(policy, 1)
    frozen_copy = adapted()
    assert worker.load(first).number == first.number
    base = ray.asked[0]
    move(policy)
    second = sender.send(policy, 2)
    check(worker, policy, second, scenes)  # a call brings its weights
    assert ray.asked[1] < 0.3 * base  # adapters only
    check(worker, frozen_copy, first, scenes)  # and back, for a call that was handed out before the push
    assert ray.asked[2] < 0.3 * base
    late = worker_of(policy)
    check(late, policy, second, scenes)
    assert ray.asked[3] > 0.9 * base
    policy_b = add_lora(make(seed=8), SETTINGS, seed=1)
    third = sender.send(policy_b, 3)
    check(worker, policy_b, third, scenes)
    assert ray.asked[4] > 0.9 * base


def test_weights_that_come_while_it_samples_wait_until_a_call_asks_for_them(ray: Ray, scenes: list[Scene]) -> None:
    policy = make()
    sender, worker = WeightSender(pickle.dumps, 10**6), worker_of(policy)
    first = sender.send(policy, 1)
    worker.fetch(first)  # it has nothing to do, so it loads them
    assert (worker.load(first).number, len(ray.asked)) == (1, 1)
    old = make()
    with torch.no_grad():
        policy.head.mixture.bias.add_(0.3)
    second = sender.send(policy, 2)
    with worker._lock:  # as while it samples
        worker.fetch(second)
    check(worker, old, first, scenes)
    check(worker, policy, second, scenes)
    assert len(ray.asked) == 2  # it had been fetched
    worker.fetch(first)  # an announcement that comes late
    assert (worker.load(second).number, len(ray.asked)) == (2, 2)


def test_half_loaded_weights_are_no_version(ray: Ray, scenes: list[Scene]) -> None:
    policy = make()
    worker, sender = worker_of(policy), WeightSender(pickle.dumps, 10_000)
    good = sender.send(policy, 1)
    worker.load(good)
    bad = replace(good, number=2, trained=(good.trained[0], pickle.dumps([1])))
    with pytest.raises(AttributeError):
        worker.load(bad)
    with torch.no_grad():
        check(worker, policy, good, scenes)
    assert len(ray.asked) == 3  # the good ones were loaded again


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (TimeoutError(), r"it waited 60\.\d+ s for the object store to bring weights version 3 \(0 MB\)"),
        (OSError("owner died"), "it could not fetch weights version 3.*owner died"),
    ],
)
def test_store_that_does_not_deliver_counts_as_a_lost_worker(ray: Ray, error: Exception, match: str) -> None:
    policy = make()
    worker, weights = worker_of(policy), WeightSender(pickle.dumps, 10**6).send(policy, 3)
    ray.error = error
    with pytest.raises(WorkerLostError, match=match):
        worker.load(weights)


def test_gpu_that_is_not_there_is_named(ray: Ray) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match=r"was to have 0\.5 GPUs, and torch finds none there"):
        worker_of(make(), num_gpus=0.5)


def test_scene_travels_as_its_network_inputs_alone(scenes: list[Scene]) -> None:
    policy = make()
    call = call_of(policy, scenes)
    data = pickle.dumps(call)
    for name in (b"SceneReference", b"Observation", b"rlhf_drive.scenes"):
        assert name not in data
    arrays = sum(array.nbytes for scene in call.scenes for array in scene.features.values())
    assert arrays < len(data) < 1.1 * arrays + 2_000


@pytest.mark.parametrize("make_policy", [make, adapted])
def test_weights_are_trained_or_frozen_as_where_they_come_from(ray: Ray, make_policy: Callable[[], Policy]) -> None:
    """Torch chooses kernels by it, also without gradients: at a recipe's size the last bits depend on it."""
    policy = make_policy()
    for name, parameter in policy.named_parameters():
        if "router" in name:
            parameter.requires_grad_(False)
    worker = worker_of(policy)
    worker.load(WeightSender(pickle.dumps, 10_000).send(policy, 1))
    wanted = {name: weight.requires_grad for name, weight in named_weights(policy).items()}
    assert {True, False} == set(wanted.values())
    assert {name: weight.requires_grad for name, weight in worker._weights.items()} == wanted
