"""Losses, gradients, metrics and advantages against TRL's own code, run on random tensors with a stand-in trainer."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_drive.objectives import (
    AdvantageInputs,
    AdvantageSettings,
    LossInputs,
    ObjectiveSettings,
    ScaleRewards,
    count_denominators,
    group_advantages,
    make_advantages,
    make_objective,
    reward_penalty,
)

LOW, HIGH = 0.2, 0.28
CAP = 1.02
"""CISPO's epsilon_high is the cap itself."""
SHARED = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")
"""Loss types that TRL has too."""
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


@pytest.fixture(scope="module")
def grpo_trainer() -> Any:
    """TRL's trainer class; its methods are called unbound on a stand-in that has just the attributes they read."""
    return pytest.importorskip("trl").GRPOTrainer


class _Stub(SimpleNamespace):
    """Attributes that are not set read as None: every optional feature of the trainer is off."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _accelerator() -> _Stub:
    return _Stub(
        num_processes=1,
        process_index=0,
        device=torch.device("cpu"),
        gather=lambda value: value,
        reduce=lambda value, reduction: value,
    )


def _metrics() -> dict[str, dict[str, list[float]]]:
    return {"train": defaultdict(list)}


def _trl_loss(
    trainer: Any,
    inputs: LossInputs,
    settings: ObjectiveSettings,
    accumulation: int,
    tokens: float,
    correction: Tensor | None = None,
) -> tuple[Tensor, dict[str, list[float]]]:
    """TRL's loss and metrics; `correction` is its own importance-sampling ratio, of `_trl_correction`."""
    n, t = inputs.logp.shape
    entropy = torch.zeros(n, t) if inputs.entropy is None else inputs.entropy
    stub = _Stub(
        _get_per_token_logps_and_entropies=lambda *_, **__: (inputs.logp, entropy, None),
        top_entropy_quantile=1.0,
        importance_sampling_level=settings.importance_sampling_level,
        loss_type=settings.loss_type,
        beta=settings.beta,
        epsilon_low=settings.epsilon,
        epsilon_high=settings.epsilon_high,
        entropy_coef=settings.entropy_coef,
        _entropy_bonus_enabled=settings.entropy_coef != 0.0,
        args=_Stub(
            steps_per_generation=accumulation,
            delta=settings.delta or None,
            sapo_temperature_pos=settings.sapo_temperature_pos,
            sapo_temperature_neg=settings.sapo_temperature_neg,
            use_bias_correction_kl=settings.use_bias_correction_kl,
        ),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=accumulation,
        max_completion_length=t + 2,
        accelerator=_accelerator(),
        _metrics=_metrics(),
        use_vllm=correction is not None,
        vllm_importance_sampling_correction=correction is not None,
    )
    ids = torch.zeros(n, 1, dtype=torch.long)
    batch = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": torch.zeros(n, t, dtype=torch.long),
        "completion_mask": inputs.mask.long(),
        "advantages": inputs.advantages,
        "old_per_token_logps": inputs.old_logp,
        "ref_per_token_logps": inputs.ref_logp,
        "num_items_in_batch": torch.tensor(tokens),
        "importance_sampling_ratio": correction,
    }
    return trainer._compute_loss(stub, None, batch), stub._metrics["train"]


def _trl_correction(trainer: Any, inputs: LossInputs, level: str, cap: float) -> tuple[Tensor, dict[str, list[float]]]:
    """TRL's importance-sampling ratio and its metrics, out of its generation step: rows are cut where the mask ends."""
    assert inputs.behaviour_logp is not None
    n = len(inputs.logp)
    lengths = inputs.mask.sum(1).tolist()
    tokens = [[1] * length for length in lengths]
    sampled = [row[:length] for row, length in zip(inputs.behaviour_logp.tolist(), lengths, strict=True)]
    metrics = _metrics()
    output = _trl_output(
        trainer, torch.zeros(n, 1), 4, scale_rewards="none", _metrics=metrics,
        _generate=lambda prompts: ([[1]] * n, tokens, None, ["x"] * n, sampled, {}, None, None),
        _get_per_token_logps_and_entropies=lambda *_, **__: (inputs.old_logp, None, None),
        use_vllm=True, vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=f"{level}_truncate", vllm_importance_sampling_clip_max=cap,
        _tokenizer=_Stub(pad_token_id=0, decode=lambda *_, **__: "x"),
    )  # fmt: skip
    return output["importance_sampling_ratio"], metrics["train"]


def _settings(loss_type: str, level: str, **changes: Any) -> ObjectiveSettings:
    changes.setdefault("epsilon_high", CAP if loss_type == "cispo" else HIGH)
    return ObjectiveSettings(loss_type, level, LOW, **changes)


def _random(seed: int, n: int = 8, t: int = 6) -> LossInputs:
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(n, t, generator=g, dtype=torch.float64)
    return LossInputs(
        logp=(old + 0.4 * torch.randn(n, t, generator=g, dtype=torch.float64)).requires_grad_(),
        old_logp=old,
        ref_logp=old + 0.3 * torch.randn(n, t, generator=g, dtype=torch.float64),
        advantages=torch.randn(n, generator=g, dtype=torch.float64),
        mask=torch.arange(t)[None] < torch.randint(1, t + 1, (n, 1), generator=g),
        entropy=torch.rand(n, t, generator=g, dtype=torch.float64).requires_grad_(),
    )


def _gradients(loss: Tensor, inputs: LossInputs) -> tuple[Tensor, ...]:
    """With respect to log-probabilities and entropies; zeros where the loss does not depend on them."""
    assert inputs.entropy is not None
    return torch.autograd.grad(loss, (inputs.logp, inputs.entropy), materialize_grads=True, retain_graph=True)


def _assert_equal(ours: Tensor, theirs: Tensor, inputs: LossInputs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    found = _gradients(ours, inputs)
    for mine, wanted in zip(found, _gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)
    assert found[0].abs().max().item() > 1e-3


@pytest.mark.parametrize("entropy_coef", [0.0, 0.03])
@pytest.mark.parametrize(("beta", "corrected"), [(0.0, False), (0.07, False), (0.07, True)])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", SHARED)
def test_loss_gradient_and_metrics(
    grpo_trainer: Any, loss_type: str, level: str, beta: float, corrected: bool, entropy_coef: float
) -> None:
    for seed in (0, 1):
        inputs = _random(seed)
        denominators = count_denominators(inputs.mask, max_length=inputs.mask.shape[1] + 2)
        settings = _settings(
            loss_type, level, beta=beta, use_bias_correction_kl=corrected, entropy_coef=entropy_coef,
            sapo_temperature_pos=1.3, sapo_temperature_neg=1.7,
        )  # fmt: skip
        out = make_objective(settings)(inputs, denominators)
        theirs, metrics = _trl_loss(grpo_trainer, inputs, settings, 1, denominators.tokens)
        _assert_equal(out.loss, theirs, inputs)
        names = {"entropy/mean": "entropy"}
        if loss_type in CLIPPED:
            names["ratio/clip_frac"] = "clip_ratio/region_mean"
            names["ratio/clip_low_frac"] = "clip_ratio/low_mean"
            names["ratio/clip_high_frac"] = "clip_ratio/high_mean"
        if loss_type == "cispo":
            names["ratio/clip_frac"] = "cispo_clip_ratio"
        if beta and not corrected:
            names["kl/ref_k3"] = "kl"
        for ours, trl_name in names.items():
            assert out.metrics[ours].item() == pytest.approx(metrics[trl_name][0], abs=1e-6), ours
        if entropy_coef:
            policy = out.metrics["loss/policy"] + out.metrics.get("loss/kl", 0.0)
            assert float(policy) == pytest.approx(metrics["policy_loss"][0], abs=1e-6)
        assert (out.metrics["ratio/clip_frac"].item() > 0) == (loss_type != "sapo")


@pytest.mark.parametrize("beta", [0.0, 0.07])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", SHARED)
def test_truncated_importance_sampling(grpo_trainer: Any, loss_type: str, level: str, beta: float) -> None:
    """Samples of another policy, as TRL has them of vLLM: its ratio, its loss and its metrics of that ratio."""
    inputs = _random(6)
    noise = torch.randn(inputs.logp.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    # TRL reads the sampler's log-probabilities as float32.
    inputs = replace(inputs, behaviour_logp=(inputs.old_logp - 0.1 + 0.3 * noise).float().double())
    denominators = count_denominators(inputs.mask, max_length=inputs.mask.shape[1] + 2)
    settings = _settings(loss_type, level, beta=beta, use_bias_correction_kl=True, importance_sampling_cap=1.25)
    out = make_objective(settings)(inputs, denominators)
    ratio, metrics = _trl_correction(grpo_trainer, inputs, level, 1.25)
    theirs = _trl_loss(grpo_trainer, inputs, settings, 1, denominators.tokens, ratio)[0]
    _assert_equal(out.loss, theirs, inputs)
    for name in ("mean", "min", "max"):
        wanted = metrics[f"sampling/importance_sampling_ratio/{name}"][0]
        assert out.metrics[f"correction/{name}"].item() == pytest.approx(wanted, abs=1e-6), name
    assert out.metrics["correction/max"].item() == 1.25
    plain = make_objective(replace(settings, importance_sampling_cap=0.0))(inputs, denominators)
    assert (_gradients(plain.loss, inputs)[0] - _gradients(out.loss, inputs)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", CLIPPED)
def test_two_sided_clipping(grpo_trainer: Any, loss_type: str, level: str) -> None:
    """Ratios well above delta with negative advantages: the bound is the loss's value there, and stops the gradient."""
    inputs = _random(5)
    raised = (inputs.logp.detach() + 0.6).requires_grad_()
    inputs = replace(inputs, logp=raised, advantages=-inputs.advantages.abs())
    denominators = count_denominators(inputs.mask, max_length=inputs.mask.shape[1] + 2)
    settings = _settings(loss_type, level, delta=1.6)
    ours = make_objective(settings)(inputs, denominators).loss
    _assert_equal(ours, _trl_loss(grpo_trainer, inputs, settings, 1, denominators.tokens)[0], inputs)
    unbounded = make_objective(replace(settings, delta=0.0))(inputs, denominators).loss
    assert unbounded.item() > ours.item() + 0.01


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", SHARED)
def test_gradient_accumulation(grpo_trainer: Any, loss_type: str, level: str) -> None:
    """Two micro-batches of TRL add up to our full batch: one window, with the window's own token count.

    bnpo is a mean over each micro-batch, and is split in ours too. TRL's entropy bonus is such a mean for every loss
    type, ours one over the whole batch: they agree where the micro-batches hold equally many tokens, as here.
    """
    inputs = _random(3)
    counts = inputs.mask.sum(1).tolist()
    assert sum(counts[:4]) != sum(counts[4:])
    halves = (slice(0, 4), slice(4, 8))
    denominators = count_denominators(inputs.mask, max_length=inputs.mask.shape[1] + 2, micro_batches=2)
    settings = _settings(loss_type, level, beta=0.05)
    parts = [_rows(inputs, half) for half in halves]
    theirs = sum(_trl_loss(grpo_trainer, part, settings, 2, denominators.tokens)[0] for part in parts)
    assert isinstance(theirs, Tensor)
    objective = make_objective(settings)
    if loss_type != "bnpo":
        _assert_equal(objective(inputs, replace(denominators, micro_batches=1)).loss, theirs, inputs)
    split = sum(objective(part, denominators).loss for part in parts)
    assert isinstance(split, Tensor)
    _assert_equal(split, theirs, inputs)


def test_entropy_bonus_of_equal_micro_batches(grpo_trainer: Any) -> None:
    inputs = _random(4)
    inputs = replace(inputs, mask=torch.ones_like(inputs.mask))
    denominators = count_denominators(inputs.mask, max_length=inputs.mask.shape[1] + 2)
    settings = _settings("dapo", "token", entropy_coef=0.1)
    parts = [_rows(inputs, half) for half in (slice(0, 4), slice(4, 8))]
    theirs = sum(_trl_loss(grpo_trainer, part, settings, 2, denominators.tokens)[0] for part in parts)
    assert isinstance(theirs, Tensor)
    _assert_equal(make_objective(settings)(inputs, denominators).loss, theirs, inputs)


def _rows(inputs: LossInputs, rows: slice) -> LossInputs:
    assert inputs.ref_logp is not None
    assert inputs.entropy is not None
    return LossInputs(
        inputs.logp[rows],
        inputs.old_logp[rows],
        inputs.ref_logp[rows],
        inputs.advantages[rows],
        inputs.mask[rows],
        entropy=inputs.entropy[rows],
    )


def _trl_advantages(trainer: Any, rewards: Tensor, num_generations: int, **settings: Any) -> Tensor:
    """Advantages out of TRL's generation step."""
    return _trl_output(trainer, rewards, num_generations, **settings)["advantages"]  # type: ignore[no-any-return]


def _trl_output(trainer: Any, rewards: Tensor, num_generations: int, **settings: Any) -> dict[str, Any]:
    """What TRL's generation step gives to its loss, with the generation and the reward call stubbed; NaN is unscorable.

    Rewards are ``[N, C]``, one column per reward function.
    """
    n, columns = rewards.shape
    tokens = [[1, 2]] * n
    names = [f"reward_{c}" for c in range(columns)]
    options: dict[str, Any] = {
        "beta": 0.0,
        "_generate": lambda prompts: (tokens, tokens, None, ["x"] * n, None, {}, None, None),
        "multi_objective_aggregation": "sum_then_normalize",
        "reward_weights": torch.ones(columns, dtype=rewards.dtype),
        "_metrics": _metrics(),
        "_tokenizer": _Stub(pad_token_id=0),
        **settings,
    }
    stub = _Stub(
        accelerator=_accelerator(),
        model=_Stub(training=True),
        args=_Stub(per_device_train_batch_size=n, steps_per_generation=1, gradient_accumulation_steps=1),
        num_iterations=1,
        _calculate_rewards=lambda *_, **__: rewards.clone(),
        num_generations=num_generations,
        reward_func_names=names,
        reward_funcs=names,
        _logs={
            "prompt": [],
            "completion": [],
            "rewards": defaultdict(list),
            "advantages": [],
            "extra": defaultdict(list),
        },
        _pending_extra_logs={},
        _pending_metrics={},
        **options,
    )
    return trainer._generate_and_score_completions(stub, [{"prompt": "p"}] * n)  # type: ignore[no-any-return]


def _rewards() -> Tensor:
    """Six groups of four, some of them with rows that could not be scored."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(24, generator=generator, dtype=torch.float64)
    rewards[[1, 7]] = torch.nan  # a group of four each keeps three rows
    rewards[8:11] = torch.nan  # one row is left: nothing to compare it with
    rewards[12:16] = torch.nan  # none is left
    rewards[16:20] = 0.25  # no spread
    return rewards


@pytest.mark.parametrize("scale_rewards", ["none", "group", "batch"])
def test_advantages_with_unscorable_rows(grpo_trainer: Any, scale_rewards: ScaleRewards) -> None:
    rewards = _rewards()
    ours = group_advantages(rewards, rewards.isfinite(), 4, scale_rewards=scale_rewards, tolerance=0.0)
    theirs = _trl_advantages(grpo_trainer, rewards[:, None], 4, scale_rewards=scale_rewards)
    # TRL forms n / (n - 1) in float32.
    torch.testing.assert_close(ours.values, theirs, rtol=0, atol=1e-6)
    assert ours.degenerate.tolist() == [False, False, True, True, True, False]
    assert ours.values.abs().max().item() > 0.1


def test_decoupled_advantages_of_several_terms(grpo_trainer: Any) -> None:
    """GDPO with rows that could not be scored at all, and a term that does not apply to some rows."""
    generator = torch.Generator().manual_seed(1)
    terms = torch.rand(24, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1])
    terms[4:8, 1] = 2.0  # one term without spread in this group
    terms[[9, 10], 2] = torch.nan  # does not apply
    terms[[1, 7, 20]] = torch.nan  # not scorable
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    valid = ~terms.isnan().all(1)
    rewards = (terms.nan_to_num(nan=0.0) * weights).sum(1)
    estimator = make_advantages(AdvantageSettings("gdpo"))
    ours = estimator(AdvantageInputs(rewards, valid, 4, terms, weights))
    theirs = _trl_advantages(
        grpo_trainer, terms, 4, multi_objective_aggregation="normalize_then_sum", reward_weights=weights
    )
    torch.testing.assert_close(ours.values, theirs, rtol=0, atol=1e-6)
    assert ours.values.abs().max().item() > 1.0
    grouped = group_advantages(rewards, valid, 4, scale_rewards="group", tolerance=0.0).values
    assert (ours.values - grouped).abs().max().item() > 0.1


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_leave_one_out_and_divergence_in_the_reward(beta: float) -> None:
    """TRL's RLOO subtracts beta times the summed k1 from the reward, then compares with the others of the group."""
    trainer = pytest.importorskip("trl").RLOOTrainer
    rewards = _rewards()
    n, t = len(rewards), 2
    generator = torch.Generator().manual_seed(2)
    old, ref = -torch.rand(2, n, t, generator=generator, dtype=torch.float64)
    policies = iter((old, ref))
    theirs = _trl_advantages(
        trainer, rewards[:, None], 4, beta=beta, normalize_advantages=False, ref_model=_Stub(),
        _generate=lambda prompts: ([[1, 2]] * n, [[1, 2]] * n, ["x"] * n),
        _get_per_token_logps_and_entropies=lambda *_, **__: (next(policies), None, None),
    )  # fmt: skip
    settings = ObjectiveSettings(beta=beta, kl_estimator="k1", kl_in="reward")
    penalised = rewards - reward_penalty(old, ref, torch.ones(n, t, dtype=torch.bool), settings)
    inputs = AdvantageInputs(penalised, rewards.isfinite(), 4)
    ours = make_advantages(AdvantageSettings("rloo"))(inputs).values
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (ours - make_advantages(AdvantageSettings())(inputs).values).abs().max().item() > 0.01
