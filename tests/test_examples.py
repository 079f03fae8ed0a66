"""The examples run, and show what they say."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewards.pdms import score_pdms
from rewards.prepare import prepare_scene
from rlhf_drive.config import load_recipe
from rlhf_drive.objectives import AdvantageInputs, Denominators, LossInputs
from rlhf_drive.registry import load_function
from rlhf_drive.scenes.generator import generate_scenes
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.build import build_policy
from rlhf_drive.training.checkpoint import publish_policy
from rlhf_drive.training.metrics import read_metrics

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def main_of(name: str) -> Any:
    """`main` of an example."""
    return load_function(f"{EXAMPLES / name}.py:main")


def test_train_in_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = main_of("train_in_python")(20, 3, 2, tmp_path)
    printed = capsys.readouterr().out
    assert list(result.planners) == ["before RL", "after RL", "human", "constant_velocity"]
    store = SceneStore.open(tmp_path / "scenes")
    scenes = store.split("heldout")
    assert result.tokens == tuple(scene.token for scene in scenes)
    human = [score_pdms(prepare_scene(s.reference), s.reference.human_poses[None]).pdms[0] for s in scenes]
    np.testing.assert_array_equal(result.column("human"), human)
    row = next(line for line in printed.splitlines() if "human" in line)
    assert f"{100 * np.mean(human):.1f}" in row
    assert re.findall(r"^step +(\d+)  reward/total", printed, re.MULTILINE) == ["1", "2"]
    assert len(re.findall(r"loss/heldout", printed)) == 3
    plans = [result.planners[name].plans for name in ("before RL", "after RL")]
    assert np.abs(plans[0] - plans[1]).max() > 0.04  # a token, 5 cm, at least


def test_inspect_rollouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "rollouts.png"
    rollout, scores = main_of("inspect_rollouts")(group=5, steps=4, index=2, out=picture)
    header, _, *rows, last = capsys.readouterr().out.splitlines()
    assert header.endswith("5 plans of 16 tokens in 4 steps")
    assert last == f"Picture: {picture}"
    for row in rows:
        n, logp, ratio = row.split()[:3]
        assert float(logp) == pytest.approx(float(rollout.trace.logp[:, int(n)].sum()), abs=0.051)
        assert ratio in ("1.0000", "0.9999", "1.0001")
    assert sorted(int(row.split()[0]) for row in rows) == list(range(5))
    shown = [float(row.split()[-2]) for row in rows]
    assert shown == pytest.approx(sorted(scores.total, reverse=True), abs=0.0051)
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">II", data[16:24]) == (640, 640)


def test_inspect_rollouts_of_a_checkpoint(tiny_store: SceneStore, tmp_path: Path) -> None:
    policy = build_policy(load_recipe("quickstart", ["seed=5"]), torch.device("cpu"))
    publish_policy(policy, tmp_path / "policy", info={})
    main = main_of("inspect_rollouts")
    arguments = {"store": tiny_store.path, "group": 3, "steps": 2, "out": tmp_path / "picture.png"}
    one, _ = main(tmp_path / "policy", index=1, **arguments)
    fresh, _ = main(None, index=1, **arguments)
    assert one.scene_tokens == (tiny_store.split("heldout")[1].token,)
    assert not torch.equal(one.trace.logp, fresh.trace.logp)


def test_trl_reward(capsys: pytest.CaptureFixture[str]) -> None:
    scores, values = main_of("trl_reward")(count=2)
    assert scores.valid.all()
    np.testing.assert_allclose(
        scores.total, 0.8 * scores.component("pdms") + 0.2 * scores.components[:, -1], rtol=0, atol=1e-12
    )
    # Text has four digits after the point; the scores agree to about that.
    np.testing.assert_allclose(values[:2], scores.component("pdms")[:2], atol=2e-3)
    assert values[2] is None
    assert f"{scores.total[1]:8.3f}" in capsys.readouterr().out


def test_remote_reward(capsys: pytest.CaptureFixture[str]) -> None:
    scores = main_of("remote_reward")(count=2)
    main_of("remote_reward")(count=2)  # the first server has stopped: nothing stands in the way of another
    assert scores.valid.all()
    scenes = generate_scenes(2, seed=0)
    for i, scene in enumerate(scenes):
        others = scene.observation.agents[:, -1, :2].astype(np.float64)
        distance = np.linalg.norm(scene.reference.human_poses[:, None, :2] - others[None], axis=2).min()
        assert scores.component("remote")[2 * i] == pytest.approx(min(1.0, distance / 10.0), abs=1e-4)
    assert f"{scores.total[3]:8.3f}" in capsys.readouterr().out


def test_custom_objective(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = main_of("custom_objective")(20, 2, 2, tmp_path)
    shown = capsys.readouterr().out.splitlines()[-2:]
    lines = read_metrics(folder, phase="rl-seed0")
    assert [line["step"] for line in lines] == [1, 2]
    for text, line in zip(shown, lines, strict=True):
        assert f"own/penalty {line['own/penalty']:.4f}" in text
        # The second update of a step has left ratio 1; a parabola has no bounds that a ratio could pass.
        assert line["ratio/first_max"] == pytest.approx(1.0, abs=1e-4)
        assert line["own/penalty"] > 0.0
        assert line["ratio/clip_frac"] == 0.0
        # The recipe's KL term stands beside the user's loss.
        assert line["loss/kl"] > 0.0
        assert line["loss/total"] == pytest.approx(line["loss/policy"] + line["loss/kl"], abs=1e-6)


def test_custom_objective_by_hand() -> None:
    rank, spo = (load_function(f"{EXAMPLES / 'custom_objective.py'}:{name}") for name in ("rank", "spo"))
    # Of 3 valid plans the best beats 2 of 2 others, the middle one beats 1 and loses to 1; equal plans get 0.
    rewards = torch.tensor([0.9, 0.1, 0.4, 0.7, 0.5, 0.5, 0.5, 0.5])
    valid = torch.tensor([True, True, True, False, True, True, True, True])
    assert rank(AdvantageInputs(rewards, valid, 4)).tolist() == [1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    # r A - |A| / 0.4 (r - 1)^2 at r = 1.2, A = 1 is 1.2 - 0.1: the top of the parabola, without slope.
    logp = torch.tensor([[1.2, 1.0, 7.0], [5.0, 5.0, 5.0]]).log().requires_grad_()
    inputs = LossInputs(
        logp=logp,
        old_logp=torch.zeros(2, 3),
        ref_logp=None,
        advantages=torch.tensor([1.0, torch.nan]),
        mask=torch.tensor([[True, True, False], [True, True, True]]),
        rows=torch.tensor([True, False]),
    )
    outputs = spo(inputs, Denominators(sequences=1.0, tokens=2.0, max_length=3))
    assert outputs.loss.item() == pytest.approx(-(1.1 + 1.0) / 2, abs=1e-6)
    assert outputs.metrics["own/penalty"].item() == pytest.approx(0.1 / 2, abs=1e-6)
    outputs.loss.backward()
    np.testing.assert_allclose(logp.grad, [[0.0, -0.5, 0.0], [0.0, 0.0, 0.0]], atol=1e-6)
