"""Pieces that are measured: all that a step is made of, at the sizes that it calls them with."""

from __future__ import annotations

import pytest
import torch

from rlhf_drive.config import Recipe, load_recipe
from rlhf_drive.estimate import ONE_PROCESS, Workload, network_of, predict, step_of
from rlhf_drive.estimate.measure import measure
from rlhf_drive.estimate.measure_policy import PolicyPieces
from rlhf_drive.estimate.samples import sample_scenes
from rlhf_drive.estimate.work import Calls, reference_work, sampling_work, update_work
from rlhf_drive.scenes import Scene

SIZES = (
    *("policy.d_model=32", "policy.num_heads=2", "policy.num_experts=4", "policy.expert_dim=16"),
    *("rollout.scenes_per_step=4", "rollout.num_generations=4", "rollout.scenes_per_chunk=4", "device=cpu"),
)
PROCESSES = {
    "masked": (),
    "flow": (
        "process={name: flow, beta_scale: 3.0, beta_power: 0.9, distance_scale_m: 4.0}", "rollout.order=all",
        "compare.order=all",
    ),
    "autoregressive": ("process.name=autoregressive", "rollout.steps=16", "compare.steps=16"),
}  # fmt: skip


def _recipe(process: str, *more: str) -> Recipe:
    return load_recipe("quickstart", [*PROCESSES[process], *SIZES, *more])


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return sample_scenes(_recipe("masked"), 2)


def _calls(recipe: Recipe) -> list[Calls]:
    net, step = network_of(recipe), step_of(recipe)
    update = update_work(net, step, 2, step.micro_scenes)
    return [
        *sampling_work(net, step, step.chunk),
        *reference_work(net, step, 4),
        *update["likelihood"],
        *update["update"],
    ]


@pytest.mark.parametrize("more", [(), ("rl.max_tokens_per_forward=64",), ("rl.gradient_checkpointing=true",)])
@pytest.mark.parametrize("process", PROCESSES)
def test_every_piece_of_a_step_is_measured(process: str, more: tuple[str, ...], scenes: list[Scene]) -> None:
    recipe = _recipe(process, *more)
    pieces = PolicyPieces(recipe, network_of(recipe), step_of(recipe), scenes, torch.device("cpu"))
    timed = list(pieces.timed())
    assert {part.piece for part in _calls(recipe)} <= {"plans", *(piece for piece, _, _ in timed)}
    # At the sizes of the calls themselves, which are below the most that is timed.
    largest = {piece: max(n for name, n, _ in timed if name == piece) for piece, _, _ in timed}
    for part in update_work(pieces.net, pieces.step, 1, pieces.step.micro_scenes)["likelihood"]:
        assert largest[part.piece] >= round(part.units)
    for _, _, call in timed:
        call()


def test_a_measured_machine_predicts_a_whole_step(scenes: list[Scene]) -> None:
    recipe = _recipe("masked")
    machine = measure(recipe, budget_s=0.0, scenes=scenes)
    assert machine.measured
    assert machine.scorer_measured
    found = predict(Workload(network_of(recipe), step_of(recipe), 100, 10), machine, ONE_PROCESS)
    parts = ("sampling", "scoring", "reference", "likelihood", "update", "monitors")
    assert all(found.parts[name] > 0 for name in parts)
    assert found.step_s == pytest.approx(sum(found.parts[name] for name in parts))
    # 16 plans and 8 passes of a policy of 60,000 weights: far less than a minute, and not nothing.
    assert 0.005 < found.step_s < 60.0
