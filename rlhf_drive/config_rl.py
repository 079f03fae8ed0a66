"""Section `rl` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rlhf_drive.config_ranges import ACTION_TOKENS, Bounds, Count, CountOrZero, NotNegative, OpenShare, Positive, Share

__all__ = ["RlSection"]


@dataclass(frozen=True)
class RlSection:
    """Policy-gradient training on the exact likelihood of the decode."""

    policy: str | None
    """Checkpoint of the SFT policy; null = the one that this pipeline trained."""
    seeds: tuple[CountOrZero, ...]
    """One RL run per seed, each from the same SFT policy."""
    max_steps: Count
    """RL steps; each samples, scores and updates."""
    learning_rate: Positive
    """Peak learning rate of AdamW."""
    weight_decay: NotNegative
    """Decoupled weight decay."""
    warmup_ratio: Share
    """Share of the steps with a linearly rising learning rate; a cosine to zero follows."""
    max_grad_norm: Positive
    """Gradients are scaled down to this norm."""
    num_iterations: Count
    """Updates on each batch of rollouts; from the second on the ratio leaves 1."""
    micro_batch_scenes: Count
    """Scenes per backward pass; changes the memory, not the result (but see `bnpo`)."""
    max_tokens_per_forward: CountOrZero
    """Plan tokens per forward pass within a micro-batch; more are computed in parts, and again in the backward pass.
    Changes memory and time, not the result; 0 = all at once."""
    gradient_checkpointing: bool
    """Whether decoder layers are computed again in the backward pass instead of kept."""
    likelihood: Literal["trace", "marginal", "mean_field", "coupled", "elbo", "sandwich", "random_mask"]
    """Log-probability of a rollout: exact (`trace`, `marginal`) or a surrogate from the literature."""
    likelihood_draws: Count
    """Random masks that `coupled`, `elbo`, `sandwich` and `random_mask` average over."""
    likelihood_antithetic: bool
    """Whether `elbo` and `sandwich` draw their masks in complementary pairs."""
    likelihood_steps: Annotated[int, Bounds(0, ACTION_TOKENS)]
    """Decode steps that `trace` and `marginal` look at, drawn anew for every RL step; 0 = all."""
    advantages: str
    """`group_mean` (reward - mean of the group), `rloo` (- mean of the others), `gdpo` (each reward term normalised
    in its group, then summed), or a function of yours, ``path/to/file.py:function``."""
    scale_rewards: Literal["none", "group", "batch"]
    """Advantages are divided by nothing, by the group's or by the batch's standard deviation."""
    reward_scale: Positive
    """Advantages are multiplied by it."""
    spread_tolerance: NotNegative
    """Groups whose rewards differ by no more than this carry no gradient; they are filtered and counted."""
    dynamic_sampling_budget: NotNegative
    """Fresh scenes sampled at most in place of filtered groups, as a share of scenes_per_step; 0 = none (DAPO)."""
    scene_visits: Literal["uniform", "informative"]
    """Every scene alike, or more often those whose groups still differ."""
    loss_type: str
    """Objective and average over tokens, as in TRL: `grpo`, `bnpo`, `dr_grpo`, `dapo`, `cispo`, `sapo`, `luspo`;
    also `gmpo`, `wll`, or a function of yours, ``path/to/file.py:function``."""
    importance_sampling_level: Literal["token", "sequence", "sequence_token", "step"]
    """Ratio per token (GRPO), its geometric mean over the sequence (GSPO), the latter with gradients per token
    (GSPO-token), or the geometric mean within a decode step."""
    epsilon: OpenShare
    """The ratio is clipped below at 1 - epsilon."""
    epsilon_high: Positive
    """The ratio is clipped above at 1 + epsilon_high; for `cispo` the cap itself."""
    delta: NotNegative
    """Upper bound of the ratio where it would not be clipped (two-sided clipping), above 1 + epsilon_high; 0 = none."""
    importance_sampling_cap: NotNegative
    """Groups that weights other than the update's own have sampled (`rollout.max_staleness`, bfloat16) are weighed with
    the importance weight between the two, at most this much (truncated importance sampling); 0 = not weighed."""
    sapo_temperature_pos: Positive
    """Temperature of `sapo` for positive advantages."""
    sapo_temperature_neg: Positive
    """Temperature of `sapo` for the others."""
    beta: NotNegative
    """Weight of the KL divergence to the reference policy; 0 = none."""
    kl_estimator: Literal["k1", "k2", "k3"]
    """Estimate of that divergence per token."""
    kl_in: Literal["loss", "reward"]
    """Whether it is added to the loss or subtracted from the reward."""
    use_bias_correction_kl: bool
    """Whether the KL in the loss is weighed with the importance ratio, as in TRL."""
    sync_ref_model: bool
    """Whether the reference follows the policy; else it stays the policy that RL started from."""
    ref_model_mixup_alpha: Share
    """Share of the policy in the new reference; the rest is the old reference."""
    ref_model_sync_steps: Count
    """Steps between two updates of the reference."""
    entropy_coef: NotNegative
    """Weight of the mean entropy per token, which is raised; 0 = none."""
    bc_coef: NotNegative
    """Weight of the SFT loss on the human's plans of the scenes learned from, against reward hacking; 0 = none."""
    router: Literal["free", "frozen", "record", "replay"]
    """Routers of the experts: `free` = trained, choose anew in every pass; `frozen` = weights stay; `record` = trained,
    but updates use the experts chosen by the trainer's pass before the first; `replay` = those chosen in sampling."""
    load_balance_coef: NotNegative
    """Weight of the loss that spreads tokens over experts."""
    router_z_coef: NotNegative
    """Weight of the loss that keeps router logits small."""
    lora_rank: CountOrZero
    """Rank of low-rank adapters that are trained in place of the weights; 0 = all weights are trained."""
    lora_alpha: Positive
    """Adapters are scaled by lora_alpha / lora_rank."""
    lora_experts: bool
    """Whether expert weights get adapters too."""
    ema_decay: Annotated[float, Bounds(0.0, 1.0, open="high")]
    """Decay of the moving average of the weights, which is what is evaluated and published; 0 = the last weights."""
    kl_limit: NotNegative
    """Largest `kl/old_approx` (nats per token) of an update; 0 = no limit."""
    ratio_limit: NotNegative
    """Largest ratio, or inverse ratio, of an update; 0 = no limit."""
    on_limit: Literal["stop", "rollback", "next_batch"]
    """When a limit is passed: end the run, undo the step, or leave out its remaining iterations."""
    monitor_steps: CountOrZero
    """Steps between two looks at held-out scenes, which are scored with EPDMS to notice reward hacking; 0 = never."""
    monitor_scenes: Count
    """Held-out scenes looked at."""
    save_steps: Count
    """Steps between two checkpoints that a killed run can resume from."""
    keep_checkpoints: Count
    """Latest checkpoints kept on disk."""
