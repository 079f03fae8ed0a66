"""The plain numbers that decide what a run costs: of the network, and of one RL step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_drive.config import ACTION_TOKENS, Recipe
from rlhf_drive.errors import ConfigError

__all__ = ["NetworkSizes", "StepSizes", "network_of", "step_of"]


@dataclass(frozen=True)
class NetworkSizes:
    """A policy's sizes. Letters in formulas: d width, E experts, f expert width, L plan tokens, V vocabulary."""

    width: int
    """d."""
    heads: int
    """Attention heads."""
    encoder_layers: int
    """Layers over scene tokens."""
    decoder_layers: int
    """Layers over plan tokens, each with a mixture of experts."""
    experts: int
    """E routed experts of a layer, beside the shared one."""
    experts_per_token: int
    """k, under token choice."""
    expert_width: int
    """f."""
    routing: str
    """`token_choice` or `expert_choice`."""
    capacity: float
    """Share of a plan's tokens that each expert takes, under expert choice."""
    agents: int
    """Agents in a scene: the most that the policy sees."""
    lines: int
    """Map pieces in a scene: the most that the policy sees."""
    line_points: int
    """Points of a map piece."""
    vocabulary: int
    """V numeric tokens; the mask token comes on top."""
    length: int
    """L tokens of a plan, two a pose."""
    process: str
    """`masked`, `flow` or `autoregressive`."""

    @property
    def experts_of_token(self) -> float:
        """Experts that compute a token, the shared one not counted: a mean under expert choice."""
        if self.routing == "token_choice":
            return float(self.experts_per_token)
        return self.experts * max(1, round(self.capacity * self.length)) / self.length

    @property
    def scene_tokens(self) -> int:
        """M: tokens of an encoded scene, the global one and five route pieces included."""
        return 6 + self.agents + self.lines


@dataclass(frozen=True)
class StepSizes:
    """What an RL step asks for."""

    scenes: int
    """S scenes a step."""
    group: int
    """G plans of a scene."""
    chunk: int
    """Scenes sampled at once."""
    decode_steps: int
    """K."""
    order: str
    """Decoding order."""
    micro_scenes: int
    """Scenes of a micro-batch."""
    iterations: int
    """Updates on a batch."""
    max_tokens: int
    """Plan tokens of a forward pass; 0 = all of a micro-batch."""
    checkpointing: bool
    """Whether decoder layers are computed again in the backward pass."""
    likelihood: str
    """Name of the estimator."""
    draws: int
    """Random masks of a surrogate likelihood."""
    steps_seen: int
    """Decode steps that the likelihood looks at; 0 = all."""
    reference: bool
    """Whether a divergence to a reference policy is computed."""
    penalty: bool
    """Whether that divergence is taken off the reward, which takes it of all groups."""
    entropy: bool
    """Whether every update computes entropies; the first of a step always does."""
    lora_rank: int
    """Rank of adapters; 0 = all weights are trained."""
    lora_experts: bool
    """Whether experts have adapters too."""
    frozen_router: bool
    """Whether router weights stay."""
    keep_experts: bool
    """Whether traces carry the routing."""
    ema: bool
    """Whether an average of the weights is kept."""
    snapshot: bool
    """Whether a step's start is kept in memory, to undo updates."""
    refill: float
    """Fresh scenes sampled at most in place of flat groups, as a share of S."""
    staleness: int
    """Updates that sampling may be behind; 0 = they take turns."""
    monitor_every: int
    """Steps between two looks at held-out scenes; 0 = never."""
    monitor_scenes: int
    """Held-out scenes looked at."""
    save_every: int
    """Steps between checkpoints."""
    two_frames: bool
    """Whether the frame before is planned too, one plan a scene."""

    @property
    def rows(self) -> int:
        """N = S * G plans."""
        return self.scenes * self.group


def network_of(recipe: Recipe) -> NetworkSizes:
    """The sizes of a recipe's policy: from its own sections, or from the checkpoint that it starts from.

    Raises:
        ConfigError: The recipe has neither.
    """
    if recipe.policy and recipe.tokenizer and recipe.process:
        return _network(vars(recipe.policy), vars(recipe.tokenizer), recipe.process.name)
    if recipe.rl and recipe.rl.policy:
        from rlhf_drive.policies.checkpoints import complete_description, read_manifest

        folder = Path(recipe.rl.policy)
        found = complete_description(read_manifest(folder), folder)
        return _network(found["architecture"], found["tokenizer"], str(found["process"]["name"]))
    raise ConfigError(
        f"The recipe {recipe.name!r} says neither how large the policy is (section policy) nor which checkpoint it "
        "starts from (rl.policy); give one of them."
    )


def _network(policy: Any, tokenizer: Any, process: str) -> NetworkSizes:
    span = (tokenizer["high"] - tokenizer["low"]) / tokenizer["step"]
    return NetworkSizes(
        width=policy["d_model"],
        heads=policy["num_heads"],
        encoder_layers=policy["encoder_layers"],
        decoder_layers=policy["decoder_layers"],
        experts=policy["num_experts"],
        experts_per_token=policy["experts_per_token"],
        expert_width=policy["expert_dim"],
        routing=policy["routing"],
        capacity=policy["capacity_factor"],
        agents=policy["max_agents"],
        lines=policy["max_polylines"],
        line_points=policy["points_per_polyline"],
        vocabulary=round(span) + 1,
        length=ACTION_TOKENS,
        process=process,
    )


def step_of(recipe: Recipe) -> StepSizes:
    """What the recipe's RL steps ask for.

    Raises:
        ConfigError: The recipe has no RL.
    """
    rl, rollout = recipe.rl, recipe.rollout
    if not (rl and rollout and recipe.reward):
        raise ConfigError(
            f"The recipe {recipe.name!r} (job {recipe.job}) has no RL step to estimate; use one with sections reward, "
            "rollout and rl, such as `quickstart`."
        )
    limits = rl.kl_limit > 0 or rl.ratio_limit > 0
    return StepSizes(
        scenes=rollout.scenes_per_step,
        group=rollout.num_generations,
        chunk=min(rollout.scenes_per_chunk, rollout.scenes_per_step),
        decode_steps=rollout.steps,
        order=rollout.order,
        micro_scenes=rl.micro_batch_scenes,
        iterations=rl.num_iterations,
        max_tokens=rl.max_tokens_per_forward,
        checkpointing=rl.gradient_checkpointing,
        likelihood=rl.likelihood,
        draws=rl.likelihood_draws,
        steps_seen=rl.likelihood_steps,
        reference=rl.beta > 0,
        penalty=rl.beta > 0 and rl.kl_in == "reward",
        entropy=rl.entropy_coef > 0,
        lora_rank=rl.lora_rank,
        lora_experts=rl.lora_experts,
        frozen_router=rl.router == "frozen",
        keep_experts=rl.router == "replay",
        ema=rl.ema_decay > 0,
        snapshot=limits and rl.on_limit == "rollback",
        refill=rl.dynamic_sampling_budget,
        staleness=rollout.max_staleness,
        monitor_every=rl.monitor_steps,
        monitor_scenes=rl.monitor_scenes,
        save_every=rl.save_steps,
        two_frames=rollout.previous_plan == "sampled",
    )
