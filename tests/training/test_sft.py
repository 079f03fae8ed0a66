"""Supervised training: it learns, stops when the held-out loss does, and keeps the best weights."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_drive.config import Recipe
from rlhf_drive.errors import DataError, TrainingError
from rlhf_drive.policies import Policy, load_policy
from rlhf_drive.policies.checkpoints import read_manifest
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.policies.inputs import mirror_batch
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training import sft, sft_step
from rlhf_drive.training.build import build_accelerator, build_policy, sft_settings
from rlhf_drive.training.engine import TrainingEngine
from rlhf_drive.training.sft import SftResult, SftSettings, heldout_loss, train_sft

FEATURES = FeatureCache()


@dataclass
class Notes:
    """A journal that keeps what it is told."""

    lines: list[dict[str, float]] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    stop_after: int = 0

    def resume(self, step: int) -> None:
        """As the protocol says."""
        self.resumed.append(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """As the protocol says."""
        assert step == len(self.lines) + 1 + (self.resumed[-1] if self.resumed else 0)
        self.lines.append(dict(metrics))
        if step == self.stop_after:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Bench:
    """Policy, settings and scenes for a short training."""

    policy: Policy
    settings: SftSettings
    train: list[Scene]
    folder: Path

    def run(self, *, stop_after: int = 0, **changes: Any) -> tuple[SftResult, Notes]:
        """Train with changed settings, on the training scenes as held-out ones too; perhaps interrupted at a step."""
        notes = Notes(stop_after=stop_after)
        result = train_sft(
            self.policy, self.train, self.train, replace(self.settings, **changes), self.folder,
            accelerator=build_accelerator("cpu"), features=FEATURES, journal=notes,
        )  # fmt: skip
        return result, notes


@pytest.fixture
def bench(tiny_recipe: Callable[..., Recipe], tiny_store: SceneStore, tmp_path: Path) -> Bench:
    recipe = tiny_recipe("quickstart", "sft.batch_size=6", "sft.learning_rate=3e-3", "policy.dropout=0.0")
    settings = replace(sft_settings(recipe), warmup_ratio=0.0, weight_decay=0.0, save_steps=1000, patience=3)
    return Bench(build_policy(recipe, torch.device("cpu")), settings, tiny_store.split("train")[:12], tmp_path)


def flat(policy: Policy) -> torch.Tensor:
    """All weights in a row, a copy."""
    return torch.cat([value.detach().flatten().clone() for value in policy.state_dict().values()])


def script(monkeypatch: pytest.MonkeyPatch, losses: Sequence[float]) -> list[torch.Tensor]:
    """Let the held-out loss follow a script; returns the weights it was asked for, epoch by epoch."""
    seen: list[torch.Tensor] = []

    def scripted(policy: Policy, *_: object) -> float:
        seen.append(flat(policy))
        return losses[len(seen) - 1]

    monkeypatch.setattr(sft, "heldout_loss", scripted)
    return seen


def test_the_loss_falls_far_on_few_scenes(bench: Bench) -> None:
    result, notes = bench.run(max_epochs=25, patience=25, mirror=False)
    epochs = [line["loss/train_epoch"] for line in notes.lines if "loss/train_epoch" in line]
    held = [line["loss/heldout"] for line in notes.lines if "loss/heldout" in line]
    assert len(notes.lines) == 50
    assert len(epochs) == len(held) == result.epochs == 25
    # 201 numbers: guessing costs ln 201 = 5.3 nats, the untrained mixture around the anchor about 3.4.
    assert held[0] - held[-1] > 0.7
    assert epochs[0] - np.mean(epochs[-3:]) > 0.7
    assert result.heldout_loss == min(held)
    assert notes.lines[3]["loss/train_epoch"] == np.mean([line["loss/train"] for line in notes.lines[2:4]])
    assert all(line["loss/heldout_best"] <= line["loss/heldout"] for line in notes.lines if "loss/heldout" in line)


def test_training_stops_when_the_heldout_loss_stops_falling(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [3.0, 2.0, 2.1, 2.2, 2.3, 1.0])
    result, notes = bench.run(max_epochs=20, patience=3)
    assert result == SftResult(heldout_loss=2.0, epoch=2, epochs=5, late_fall=0.0, plateaued=True)
    assert len(notes.lines) == 10  # two steps an epoch


def test_a_fall_too_small_to_matter_does_not_go_on_for_ever(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [3.0, 2.9995, 2.999, 2.0])
    result, _ = bench.run(max_epochs=20, patience=2)
    assert result == SftResult(heldout_loss=2.999, epoch=3, epochs=3, late_fall=1 - 2.999 / 2.9995, plateaued=True)


@pytest.mark.parametrize(("last", "plateaued"), [(1.97, False), (1.99, True)])
def test_whether_the_loss_still_falls_is_judged_by_the_last_fifth(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, last: float, plateaued: bool
) -> None:
    # Ten epochs: the best of the first eight is 2.0, so 1.97 is a fall by 1.5 % and 1.99 one by 0.5 %.
    script(monkeypatch, [3.0, 2.8, 2.6, 2.4, 2.3, 2.2, 2.0, 2.1, 2.05, last])
    result, _ = bench.run(max_epochs=10, patience=5)
    assert result.late_fall == pytest.approx(1 - last / 2.0)
    assert (result.epoch, result.plateaued) == (10, plateaued)


def test_the_best_weights_are_published_and_stay_in_the_policy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = script(monkeypatch, [3.0, 2.0, 2.5, 2.7])
    bench.run(max_epochs=4, patience=9)
    assert len(seen) == 4
    assert not torch.equal(seen[1], seen[3])
    assert torch.equal(flat(load_policy(bench.folder / "policy")), seen[1])
    assert torch.equal(flat(bench.policy), seen[1])
    info = read_manifest(bench.folder / "policy")["info"]
    assert info == {"stage": "sft", "epoch": 1, "heldout_loss": 2.0}


def test_a_resumed_training_remembers_how_long_the_loss_has_not_fallen(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = script(monkeypatch, [3.0, 2.0, 2.1, 2.2, 2.3, 2.4])
    with pytest.raises(KeyboardInterrupt):
        bench.run(max_epochs=20, patience=3, save_steps=5, stop_after=7)
    assert len(seen) == 3
    best = seen[1]
    seen = script(monkeypatch, [2.1, 2.2, 2.3, 2.4])  # step 5 is in the third epoch
    result, notes = bench.run(max_epochs=20, patience=3, save_steps=5)
    assert notes.resumed == [5]
    assert result == SftResult(heldout_loss=2.0, epoch=2, epochs=5, late_fall=0.0, plateaued=True)
    assert torch.equal(flat(bench.policy), best)


def test_heldout_loss_is_a_function_of_weights_and_scenes(bench: Bench) -> None:
    values = [heldout_loss(bench.policy, bench.train, FEATURES, "mixed") for _ in range(2)]
    assert values[0] == values[1]
    assert bench.policy.training is False
    assert heldout_loss(bench.policy, bench.train[:6], FEATURES, "mixed") != values[0]


def test_broken_losses_stop_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [3.0, math.nan])
    with pytest.raises(TrainingError, match=r"held-out SFT loss is nan after epoch 2; lower sft.learning_rate"):
        bench.run(max_epochs=4)
    with torch.no_grad():
        bench.policy.head.mixture.bias.fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"The SFT loss is nan at step 0; lower sft.learning_rate"):
        bench.run(max_epochs=4)


def test_half_of_the_scenes_are_mirrored_with_their_targets(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    flips: list[torch.Tensor] = []
    tokens: list[torch.Tensor] = []
    process = bench.policy.process

    def watch_mirror(batch: Any, flip: torch.Tensor) -> Any:
        flips.append(flip)
        mirrored = mirror_batch(batch, flip)
        # What lies to the left comes to lie on the right: y of the route's first points, feature 1 of 7.
        side = torch.where(flip, -1.0, 1.0)[:, None]
        assert torch.equal(mirrored.route[:, 0, 1::7], side * batch.route[:, 0, 1::7])
        return mirrored

    class Watched:
        """The policy's process; notes the targets."""

        def sft_loss(self, policy: Policy, rows: torch.Tensor, *rest: Any) -> torch.Tensor:
            """As the process."""
            tokens.append(rows[::2])
            assert torch.equal(rows[::2], rows[1::2])
            return process.sft_loss(policy, rows, *rest)

    monkeypatch.setattr(sft_step, "mirror_batch", watch_mirror)
    monkeypatch.setattr(bench.policy, "process", Watched())
    script(monkeypatch, [1.0] * 10)
    monkeypatch.setattr(sft, "load_policy", lambda _: bench.policy)
    monkeypatch.setattr(sft, "publish_policy", lambda *_, **__: None)
    bench.run(max_epochs=10, patience=10, mirror=True)
    assert len(flips) == len(tokens) == 20
    assert 0.35 < torch.cat(flips).float().mean() < 0.65
    assert len({tuple(flip.tolist()) for flip in flips}) > 10
    human = np.stack([scene.reference.human_poses for scene in bench.train])
    known = {tuple(row) for row in bench.policy.tokenizer.encode(human).tolist()}
    other = {tuple(row) for row in bench.policy.tokenizer.encode(human * [1, -1, -1]).tolist()}
    for flip, rows in zip(torch.cat(flips).tolist(), torch.cat(tokens).tolist(), strict=True):
        assert tuple(rows) in (other if flip else known)


def test_masks_and_mirroring_depend_on_seed_and_step_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    initial = copy.deepcopy(bench.policy.state_dict())
    _, notes = bench.run(max_epochs=2)
    bench.policy.load_state_dict(initial)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "manual_seed", lambda _: torch.rand(7))  # the global generator stands elsewhere
        _, again = bench.run(max_epochs=2)
    _, other = bench.run(max_epochs=2, seed=5)
    keys = ("loss/train", "optim/grad_norm", "moe/load_cv")
    assert [[line[k] for k in keys] for line in notes.lines] == [[line[k] for k in keys] for line in again.lines]
    assert notes.lines[0]["loss/train"] != other.lines[0]["loss/train"]


def test_torch_s_own_generator_is_given_back_as_it_was(bench: Bench) -> None:
    before = torch.get_rng_state()
    bench.run(max_epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_scenes_without_a_human_drive_are_refused(tiny_store: SceneStore, tiny_recipe: Callable[..., Recipe]) -> None:
    policy = build_policy(tiny_recipe(), torch.device("cpu"))
    good, other = tiny_store.split("train")[:2]
    bare = replace(other.with_reference(human_poses=np.zeros((0, 3))), token="bare")
    with pytest.raises(DataError, match=r"1 of 2 scenes do not hold what the human drove, .* the first is 'bare'"):
        heldout_loss(policy, [good, bare], FeatureCache(), "random")


def test_a_step_in_micro_batches_weighs_them_by_their_scenes(bench: Bench) -> None:
    settings = replace(bench.settings, batch_size=12, micro_batch_scenes=5, load_balance_coef=0.1, router_z_coef=0.01)
    engine = TrainingEngine(bench.policy, learning_rate=0.0, weight_decay=0.0, accelerator=build_accelerator("cpu"))
    # 5, 5 and 2 of 12 scenes, each part with masks of its own.
    total, losses = torch.zeros(()), []
    for number, part in enumerate((bench.train[:5], bench.train[5:10], bench.train[10:12])):
        loss, found = sft_step._loss(part, settings, FEATURES, sft_step._key(settings.seed, 3, number), bench.policy)
        total = total + loss * len(part) / 12
        losses.append(found["loss/train"])
    gradients = torch.autograd.grad(total, engine.parameters, allow_unused=True)
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    metrics = sft_step.sft_step(engine, bench.train, settings, 3, FEATURES)
    assert metrics["loss/train"] == pytest.approx((5 * losses[0] + 5 * losses[1] + 2 * losses[2]) / 12, rel=1e-6)
    assert float(metrics["optim/grad_norm"]) == pytest.approx(float(norm), rel=1e-4)
    assert len({sft_step._key(0, step, number) for step in range(50) for number in range(20)}) == 1000


def test_only_the_scenes_of_a_step_are_held(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft_step, "HELDOUT_SCENES", 3)
    most = 0
    made: list[weakref.ref[Scene]] = []

    class Lazy(Sequence[Scene]):
        """Scenes that are made when asked for, each anew."""

        def __len__(self) -> int:
            return len(bench.train)

        def __getitem__(self, index: Any) -> Any:
            nonlocal most
            assert isinstance(index, int)  # nobody takes a slice, which a store would have to read at once
            scene = copy.copy(bench.train[index])
            made.append(weakref.ref(scene))
            most = max(most, sum(reference() is not None for reference in made))
            return scene

    again = replace(bench, train=Lazy())  # type: ignore[arg-type]
    again.run(max_epochs=2, batch_size=2)
    assert len(made) > 60
    assert most <= 8  # of 12: a step, a held-out part, and the part before it


def test_scenes_without_a_human_drive_are_found_before_training(bench: Bench) -> None:
    bare = replace(bench.train[7].with_reference(human_poses=np.zeros((0, 3))), token="bare")
    scenes = [*bench.train[:7], bare, *bench.train[8:], bare]
    notes = Notes()
    with pytest.raises(DataError, match=r"2 of 13 scenes do not hold what the human drove, .* the first is 'bare'"):
        train_sft(
            bench.policy, scenes, bench.train, bench.settings, bench.folder, accelerator=build_accelerator("cpu"),
            features=FEATURES, journal=notes,
        )  # fmt: skip
    assert notes.lines == []
