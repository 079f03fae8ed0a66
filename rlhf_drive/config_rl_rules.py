"""Rules between a recipe's RL keys and its decoding process: what fits what, and why not. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rlhf_drive.config_schema import ACTION_TOKENS, POLICY_FILE, CompareSection, Recipe, RlSection, RolloutSection
from rlhf_drive.likelihood_fits import STEPPED, draws_refusal, refusal, replay_refusal, steps_refusal
from rlhf_drive.objective_rules import ADVANTAGES, combination_problems, name_problem

__all__ = ["find_rl_conflicts", "process_of_checkpoint"]

ORDERS = {"flow": ("all",), "autoregressive": ("causal",)}
"""The one order of processes that have one; a masked policy takes all others but `all`."""


def find_rl_conflicts(recipe: Recipe) -> Iterator[str]:
    """Problems of decoding, likelihood, routing and reference; ``key.path: what is wrong``, one line each."""
    process: str | None = recipe.process.name if recipe.process else None
    if recipe.rl and recipe.rl.policy:
        process = process_of_checkpoint(recipe.rl.policy) or process
    if recipe.rollout and process:
        yield from _decoding("rollout", recipe.rollout, process, recipe.rl.policy if recipe.rl else None)
    if recipe.compare:
        compared = {process_of_checkpoint(path) for path in recipe.compare.policies.values()}
        compared |= {process} if recipe.job == "pipeline" else set()
        for name in sorted(name for name in compared if name):
            yield from _decoding("compare", recipe.compare, name)
    if recipe.policy and recipe.process and recipe.policy.routing == "expert_choice" and process == "autoregressive":
        yield (
            "policy.routing: with expert_choice an expert compares a token with later ones, which an autoregressive "
            "policy must not see. Use token_choice"
        )
    if recipe.rl:
        yield from _likelihood(recipe.rl, process)
        yield from _rest(recipe, recipe.rl)


def process_of_checkpoint(path: str) -> str | None:
    """Name of the decoding process in a policy folder's manifest; None where there is none to read."""
    try:
        name = json.loads((Path(path) / POLICY_FILE).read_text())["process"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # loading the policy says what is wrong with it
    return name if isinstance(name, str) else None


def _decoding(
    name: str, section: RolloutSection | CompareSection, process: str, checkpoint: str | None = None
) -> Iterator[str]:
    """Order and steps that the process, of the recipe or of a checkpoint, does not decode with."""
    whose = f" (of {checkpoint})" if checkpoint else ""
    if process in ORDERS and section.order not in ORDERS[process]:
        only = ORDERS[process][0]
        yield f"{name}.order: process {process!r}{whose} decodes in order {only!r} only; got {section.order!r}"
    if process == "masked" and section.order == "all":
        yield f"{name}.order: a masked policy reveals each position once; 'all' is for a flow. Use causal"
    if process == "autoregressive" and section.steps != ACTION_TOKENS:
        yield f"{name}.steps: an autoregressive policy decides one token a step, {ACTION_TOKENS}; got {section.steps}"


def _likelihood(rl: RlSection, process: str | None) -> Iterator[str]:
    """Likelihoods that do not fit the process, the objective, or the way experts are chosen."""
    if process and (reason := refusal(rl.likelihood, process)):
        yield f"rl.likelihood: {reason}"
    if rl.likelihood_steps and (reason := steps_refusal(rl.likelihood, rl.loss_type, rl.importance_sampling_level)):
        yield f"rl.likelihood_steps: {reason}"
    if rl.router == "replay" and (reason := replay_refusal(rl.likelihood)):
        yield f"rl.router: {reason}"
    if reason := draws_refusal(rl.likelihood, rl.likelihood_draws, rl.likelihood_antithetic):
        key, _, rest = reason.partition(" ")
        yield f"rl.{key}: {rest}"
    if rl.likelihood == "sandwich" and rl.num_iterations > 1:
        yield (
            "rl.num_iterations: likelihood 'sandwich' has no ratio and is on-policy only. Use 1, or another "
            f"likelihood; got {rl.num_iterations}"
        )
    if rl.likelihood == "sandwich" and rl.beta > 0 and rl.kl_in == "reward":
        yield (
            "rl.kl_in: likelihood 'sandwich' bounds by the sign of the advantage, which a KL in the reward would "
            "change. Use loss, or another likelihood"
        )
    if rl.importance_sampling_level == "step" and rl.likelihood not in STEPPED:
        yield (
            f"rl.importance_sampling_level: likelihood {rl.likelihood!r} does not visit the decode steps that 'step' "
            "averages over. Use token or sequence, or likelihood trace"
        )


def _router_losses(recipe: Recipe, rl: RlSection) -> Iterator[str]:
    """Losses of routers that cannot learn from them."""
    if not (rl.load_balance_coef or rl.router_z_coef):
        return
    key = "load_balance_coef" if rl.load_balance_coef else "router_z_coef"
    if rl.lora_rank:
        yield f"rl.{key}: adapters leave routers as they are. Set it to 0, or lora_rank to 0"
    elif rl.router == "frozen":
        yield f"rl.{key}: routers are frozen. Set it to 0, or router to free, record or replay"
    if rl.max_tokens_per_forward:
        yield f"rl.{key}: is a loss of a whole micro-batch, which max_tokens_per_forward divides. Set one of them to 0"
    if rl.load_balance_coef and recipe.policy and recipe.policy.routing == "expert_choice":
        yield "rl.load_balance_coef: with expert_choice every expert has the same load. Set it to 0"


def _rest(recipe: Recipe, rl: RlSection) -> Iterator[str]:
    yield from _router_losses(recipe, rl)
    if rl.kl_in == "reward" and rl.beta == 0:
        yield "rl.kl_in: has no effect with beta 0. Set it to loss, or beta above 0"
    for problem in (*name_problem("advantages", rl.advantages, ADVANTAGES), *combination_problems(rl)):
        key, _, rest = problem.partition(" ")
        yield f"{key}: {rest.removeprefix('= ')}"
    if rl.sync_ref_model and rl.beta == 0:
        yield "rl.sync_ref_model: has no effect with beta 0. Set it to false, or beta above 0"
    if rl.sync_ref_model and rl.lora_rank:
        yield "rl.sync_ref_model: the reference of a LoRA run is the policy without adapters. Set it to false"
    if rl.advantages == "gdpo" and recipe.reward and recipe.reward.gates:
        yield "rl.advantages: gdpo normalises each term by itself, which gates do not allow. Use terms only"
    if rl.advantages == "gdpo" and rl.beta > 0 and rl.kl_in == "reward":
        yield "rl.kl_in: gdpo looks at the reward's terms, from which no KL is taken. Use loss, or other advantages"
    if rl.lora_rank and recipe.policy:
        sides = {"d_model": recipe.policy.d_model} | (
            {"expert_dim": recipe.policy.expert_dim} if rl.lora_experts else {}
        )
        side = min(sides, key=lambda name: sides[name])
        if rl.lora_rank > sides[side]:
            yield f"rl.lora_rank: at most policy.{side} = {sides[side]}, a side of adapted weights; got {rl.lora_rank}"
    if (rl.kl_limit or rl.ratio_limit) and rl.on_limit == "next_batch" and rl.num_iterations == 1:
        yield (
            "rl.on_limit: next_batch leaves out what follows on a batch's first update, and num_iterations 1 makes no "
            "other. Use stop or rollback, more iterations, or set kl_limit and ratio_limit to 0"
        )
    if rl.ratio_limit and rl.ratio_limit <= 1:
        yield f"rl.ratio_limit: ratios start at 1, so it must be above 1, or 0 for none; got {rl.ratio_limit:g}"
