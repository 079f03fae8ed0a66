"""NaN and infinity: what stops the run, what it names, and what is kept."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from rlhf_drive.errors import TrainingError
from rlhf_drive.training.not_finite import Evidence, check_finite, check_gradients
from rlhf_drive.training.ranks import Ranks

NAN, INF = torch.nan, torch.inf
SCENES = ["a", "a", "b", "b", "c", "c"]


def evidence(**changes: Tensor | float | None) -> Evidence:
    """Three scenes with two rows of three slots; the last slot of each row is masked and holds NaN."""
    generator = torch.Generator().manual_seed(0)
    logp = -torch.rand(6, 3, generator=generator)
    logp[:, 2] = NAN
    tensors: dict[str, Tensor | None] = {
        "loss": torch.tensor(0.5),
        "logp": logp,
        "old_logp": logp.clone(),
        "ref_logp": None,
        "advantages": torch.linspace(-1, 1, 6),
        "mask": torch.tensor([True, True, False]).expand(6, 3),
        "rewards": torch.tensor([0.1, NAN, 0.3, 0.4, 0.5, 0.6]),  # row 1 could not be scored
        "tokens": torch.arange(12).view(6, 2),
        "states": torch.arange(48).view(4, 6, 2),
    }
    tensors |= {n: torch.tensor(v) if isinstance(v, float) else v for n, v in changes.items()}
    return Evidence(11, SCENES, torch.arange(8, 14), tensors, {"reward/total": 0.25, "kl/ref_k3": NAN, "loss/x": INF})


def spoiled(name: str, *where: tuple[int, ...], value: float = NAN) -> Evidence:
    tensor = evidence().tensors[name]
    assert tensor is not None
    tensor = tensor.clone()
    for place in where:
        tensor[place] = value
    return evidence(**{name: tensor})


@pytest.fixture
def policy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = folder / "offending" / "step-000012"
    report = json.loads((found / "scenes.json").read_text(), parse_constant=refuse)
    return safetensors.torch.load_file(found / "tensors.safetensors"), report


def test_a_healthy_pass_writes_nothing(policy: nn.Module, tmp_path: Path) -> None:
    """Masked slots and rewards of rows that could not be scored hold NaN by design."""
    check_finite(evidence(), policy, tmp_path)
    check_gradients(torch.tensor(3.0), evidence(), policy, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("name", "place", "scene", "row"),
    [("logp", (2, 1), "b", 10), ("old_logp", (5, 0), "c", 13), ("advantages", (0,), "a", 8),
     ("ref_logp", (3, 1), "b", 11)],
)  # fmt: skip
def test_rows_that_are_not_finite_are_named(
    policy: nn.Module, tmp_path: Path, name: str, place: tuple[int, ...], scene: str, row: int, value: float
) -> None:
    base = evidence(ref_logp=evidence().tensors["logp"])
    spoilt = base.tensors[name]
    assert spoilt is not None
    spoilt = spoilt.clone()
    spoilt[place] = value
    broken = Evidence(11, SCENES, base.rows, {**base.tensors, name: spoilt}, base.metrics)
    size = 6 if name == "advantages" else 18
    with pytest.raises(TrainingError, match=rf"Step 12: not finite: {name} \(1 of {size} values\); scenes {scene}\. "):
        check_finite(broken, policy, tmp_path)
    _, report = read(tmp_path)
    assert report["scenes"] == [{"scene": scene, "rows": [row]}]
    assert report["not_finite"] == {name: 1}


def test_several_rows_of_several_scenes(policy: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"logp \(3 of 18 values\); scenes a, c"):
        check_finite(spoiled("logp", (1, 0), (4, 0), (5, 1)), policy, tmp_path)
    assert read(tmp_path)[1]["scenes"] == [{"scene": "a", "rows": [9]}, {"scene": "c", "rows": [12, 13]}]


def test_a_loss_alone_accuses_all_its_scenes(policy: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"not finite: loss \(1 of 1 values\); scenes a, b, c"):
        check_finite(evidence(loss=INF), policy, tmp_path)
    scenes = read(tmp_path)[1]["scenes"]
    assert scenes == [
        {"scene": "a", "rows": [8, 9]},
        {"scene": "b", "rows": [10, 11]},
        {"scene": "c", "rows": [12, 13]},
    ]


def test_the_folder_holds_everything_to_look_into_it(policy: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        policy[1].bias.fill_(INF)  # type: ignore[operator, union-attr]
    policy[0].weight.grad = torch.tensor([[0.0, NAN]] * 3)  # type: ignore[assignment]
    policy[0].bias.grad = torch.zeros(3)  # type: ignore[assignment]
    broken = spoiled("logp", (2, 1))
    with pytest.raises(TrainingError) as error:
        check_finite(broken, policy, tmp_path)
    message = str(error.value)
    assert str(tmp_path / "offending" / "step-000012") in message
    assert "weights 1.bias" in message
    assert "An earlier update broke the weights: lower rl.learning_rate" in message
    assert str(pickle.loads(pickle.dumps(error.value))) == message
    tensors, report = read(tmp_path)
    given = {name: value for name, value in broken.tensors.items() if value is not None}
    assert set(tensors) == {*given, "weights_not_finite", "gradients_not_finite"}
    for name, value in given.items():
        torch.testing.assert_close(tensors[name], value, rtol=0, atol=0, equal_nan=True)
    assert report["parameters"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert tensors["weights_not_finite"].tolist() == [False, False, False, True]
    assert tensors["gradients_not_finite"].tolist() == [True, False, False, False]
    assert (report["weights_not_finite"], report["gradients_not_finite"]) == (["1.bias"], ["0.weight"])
    assert (report["step"], report["rows"], report["row_scenes"]) == (12, list(range(8, 14)), SCENES)
    assert report["metrics"] == {"reward/total": 0.25, "kl/ref_k3": "nan", "loss/x": "inf"}
    assert report["gradient_norm"] is None


@pytest.mark.parametrize("norm", [NAN, INF])
def test_gradients_are_named_by_parameter(policy: nn.Module, tmp_path: Path, norm: float) -> None:
    policy[1].weight.grad = torch.tensor([[norm, 0.0, 1.0]])  # type: ignore[assignment]
    found = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
    said = rf"not finite: the gradient norm \({norm}\), gradients 1.weight; scenes a, b, c"
    with pytest.raises(TrainingError, match=said) as error:
        check_gradients(found, evidence(), policy, tmp_path)
    assert "Lower rl.learning_rate or set rl.ratio_limit" in str(error.value)
    assert read(tmp_path)[1]["gradient_norm"] == str(norm)


def test_a_process_says_which_it_is_and_writes_beside_the_others(policy: nn.Module, tmp_path: Path) -> None:
    ranks = Ranks()
    ranks.index, ranks.count = 1, 2
    with pytest.raises(TrainingError, match=r"^Step 12 on rank 1 of 2 processes: not finite: loss"):
        check_finite(evidence(loss=NAN), policy, tmp_path, ranks)
    assert [path.name for path in (tmp_path / "offending").iterdir()] == ["step-000012-rank-1"]


@pytest.mark.parametrize(
    ("name", "advice"),
    [("advantages", "check the reward"), ("old_logp", "rollout.temperature"), ("logp", "Lower rl.learning_rate")],
)
def test_what_to_do_depends_on_what_broke(policy: nn.Module, name: str, advice: str) -> None:
    with pytest.raises(TrainingError, match=advice) as error:
        check_finite(spoiled(name, (0,) if name == "advantages" else (0, 0)), policy, None)
    assert "Tensors and scenes are in" not in str(error.value)


def test_many_scenes_are_counted(policy: nn.Module) -> None:
    many = Evidence(0, [f"s{i}" for i in range(9)], torch.arange(9), {"loss": torch.tensor(NAN)})
    with pytest.raises(TrainingError, match="scenes s0, s1, s2, s3, s4 and 4 more"):
        check_finite(many, policy, None)


def test_a_crash_while_writing_leaves_no_half_folder(
    policy: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", fail)
        with pytest.raises(OSError, match="full"):
            check_finite(evidence(loss=NAN), policy, tmp_path)
    assert not (tmp_path / "offending" / "step-000012").exists()
    for loss in (NAN, INF):  # the second time, after a resume, the newer evidence takes the place
        with pytest.raises(TrainingError):
            check_finite(evidence(loss=loss), policy, tmp_path)
        torch.testing.assert_close(read(tmp_path)[0]["loss"], torch.tensor(loss), equal_nan=True)
    assert [path.name for path in (tmp_path / "offending").iterdir()] == ["step-000012"]


def test_evidence_of_micro_batches_adds_up_to_that_of_the_batch() -> None:
    whole = evidence()
    parts = []
    for rows in (slice(0, 2), slice(2, 6)):
        tensors = {
            n: v if v is None else v / 2 if v.ndim == 0 else v[:, rows] if n == "states" else v[rows]
            for n, v in whole.tensors.items()
        }
        parts.append(Evidence(11, SCENES[rows], whole.rows[rows], tensors, whole.metrics))
    joined = Evidence.concatenate(parts)
    assert joined.scene_tokens == SCENES
    assert torch.equal(joined.rows, whole.rows)
    assert set(joined.tensors) == {name for name, value in whole.tensors.items() if value is not None}
    for name, value in joined.tensors.items():
        torch.testing.assert_close(value, whole.tensors[name], rtol=0, atol=0, equal_nan=True)


def test_evidence_does_not_hold_on_to_the_graph() -> None:
    weight = torch.ones(6, 3, requires_grad=True)
    assert all(value is None or value.grad_fn is None for value in evidence(logp=weight * 2).tensors.values())
