"""Policy losses written out row by row and token by token, straight from their definitions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_drive.objectives import LossInputs, ObjectiveSettings

__all__ = ["correction", "loop_loss"]


def loop_loss(inputs: LossInputs, settings: ObjectiveSettings, max_length: int) -> Tensor:
    """Loss of a whole batch; slots are scalars, so that nothing is broadcast."""
    n, t = inputs.logp.shape
    rows = [i for i in range(n) if inputs.rows is None or bool(inputs.rows[i])]
    slots = {i: [j for j in range(t) if bool(inputs.mask[i, j])] for i in rows}
    total = torch.zeros((), dtype=inputs.logp.dtype)
    tokens = sum(len(slots[i]) for i in rows)
    for i in rows:
        if not slots[i]:
            continue
        weights = _weights(inputs, settings.importance_sampling_level, i, slots[i])
        policy = _row_mean_of_terms(inputs, settings, rows, i, slots[i], weights)
        divergence = torch.zeros_like(policy)
        if settings.beta > 0 and settings.kl_in == "loss":
            for j in slots[i]:
                divergence = divergence + _divergence(inputs, settings, i, j, weights[j]) / len(slots[i])
        row = -policy + settings.beta * divergence
        if settings.loss_type in ("grpo", "sapo", "gmpo", "wll"):
            total = total + row / len(rows)
        elif settings.loss_type in ("dapo", "cispo", "bnpo"):  # one micro-batch: the batch's tokens are its own
            total = total + row * len(slots[i]) / tokens
        elif settings.loss_type == "dr_grpo":
            total = total + row * len(slots[i]) / (len(rows) * max_length)
        else:  # luspo
            total = total + row * len(slots[i]) / len(rows)
    if settings.entropy_coef > 0:
        assert inputs.entropy is not None
        for i in rows:
            for j in slots[i]:
                total = total - settings.entropy_coef * inputs.entropy[i, j] / tokens
    return total


def _double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _weights(inputs: LossInputs, level: str, i: int, slots: list[int]) -> dict[int, Tensor]:
    """Importance weight by slot."""
    moved = {j: inputs.logp[i, j] - inputs.old_logp[i, j] for j in slots}
    if level == "token":
        return {j: moved[j].exp() for j in slots}
    if level == "sequence":
        mean = sum(moved.values(), _double(0.0)) / len(slots)
        return {j: mean.exp() for j in slots}
    if level == "sequence_token":
        value = (sum(moved.values(), _double(0.0)) / len(slots)).exp().detach()
        return {j: value * moved[j].exp() / moved[j].exp().detach() for j in slots}
    result = {}
    for j in slots:
        mates = [k for k in slots if inputs.step_of is None or inputs.step_of[k] == inputs.step_of[j]]
        product = torch.ones((), dtype=inputs.logp.dtype)
        for k in mates:
            product = product * moved[k].exp()
        result[j] = product ** (1 / len(mates))
    return result


def correction(inputs: LossInputs, settings: ObjectiveSettings, i: int, j: int, slots: list[int]) -> float:
    """Truncated weight of slot j of row i: a product of probabilities over a product of probabilities."""
    if inputs.behaviour_logp is None or settings.importance_sampling_cap == 0:
        return 1.0
    level = settings.importance_sampling_level
    together = [j] if level == "token" else slots
    if level == "step" and inputs.step_of is not None:
        together = [k for k in slots if inputs.step_of[k] == inputs.step_of[j]]
    old, behaviour = 1.0, 1.0
    for k in together:
        old *= math.exp(float(inputs.old_logp[i, k]))
        behaviour *= math.exp(float(inputs.behaviour_logp[i, k]))
    return min(old / behaviour, settings.importance_sampling_cap)


def _row_mean_of_terms(
    inputs: LossInputs,
    settings: ObjectiveSettings,
    rows: list[int],
    i: int,
    slots: list[int],
    weights: dict[int, Tensor],
) -> Tensor:
    """Mean of a row's policy terms: over its tokens, or over its decode steps where those have the ratio."""
    if settings.loss_type == "gmpo":
        product, advantage = torch.ones((), dtype=inputs.logp.dtype), inputs.advantages[i]
        for j in slots:
            ratio = (inputs.logp[i, j] - inputs.old_logp[i, j]).exp()
            high, low = _double(settings.epsilon_high).exp(), _double(-settings.epsilon).exp()
            product = product * (torch.minimum(ratio, high) if advantage > 0 else torch.maximum(ratio, low))
        return advantage * product ** (1 / len(slots)) * correction(inputs, settings, i, slots[0], slots)
    terms = {}
    for j in slots:
        advantage = inputs.advantages[i] if inputs.advantages.ndim == 1 else inputs.advantages[i, j]
        terms[j] = _term(inputs, settings, rows, i, j, weights[j], advantage) * correction(
            inputs, settings, i, j, slots
        )
    if settings.importance_sampling_level != "step" or settings.loss_type == "wll":
        return sum(terms.values(), _double(0.0)) / len(slots)
    steps = {j: 0 if inputs.step_of is None else int(inputs.step_of[j]) for j in slots}
    mean = torch.zeros((), dtype=inputs.logp.dtype)
    for step in set(steps.values()):
        mates = [j for j in slots if steps[j] == step]
        mean = mean + sum((terms[j] for j in mates), _double(0.0)) / len(mates) / len(set(steps.values()))
    return mean


def _term(
    inputs: LossInputs, settings: ObjectiveSettings, rows: list[int], i: int, j: int, weight: Tensor, advantage: Tensor
) -> Tensor:
    """What is maximised at one slot."""
    if settings.loss_type == "wll":
        first = i - i % inputs.group_size
        group = [k for k in rows if first <= k < first + inputs.group_size]
        good = inputs.advantages[i].exp() / sum(inputs.advantages[k].exp() for k in group)
        bad = (-inputs.advantages[i]).exp() / sum((-inputs.advantages[k]).exp() for k in group)
        return len(group) * (good - bad) * inputs.logp[i, j]
    if settings.loss_type == "cispo":
        return min(float(weight.detach()), settings.epsilon_high) * advantage * inputs.logp[i, j]
    if settings.loss_type == "sapo":
        tau = settings.sapo_temperature_pos if advantage > 0 else settings.sapo_temperature_neg
        return advantage * 4 / tau / (1 + (-tau * (weight - 1)).exp())
    low, high = 1 - settings.epsilon, 1 + settings.epsilon_high
    if advantage >= 0:
        return advantage * (weight if weight <= high else _double(high))
    bounded = weight if settings.delta == 0 or weight <= settings.delta else _double(settings.delta)
    return advantage * (bounded if weight >= low else _double(low))


def _divergence(inputs: LossInputs, settings: ObjectiveSettings, i: int, j: int, weight: Tensor) -> Tensor:
    """KL term at one slot."""
    assert inputs.ref_logp is not None
    live, old, ref = inputs.logp[i, j], inputs.old_logp[i, j], inputs.ref_logp[i, j]
    if settings.kl_estimator == "k1":
        return (live - old).exp() * (live - ref)
    if settings.kl_estimator == "k2":
        return (live - ref) ** 2 / 2 * (weight.detach() if settings.use_bias_correction_kl else 1.0)
    value = (ref - live).exp() - 1 - (ref - live)
    return value * weight if settings.use_bias_correction_kl else value
