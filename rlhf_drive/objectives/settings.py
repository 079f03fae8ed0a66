"""What a recipe says about the objective and the advantages, as plain arguments with TRL's names."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AdvantageSettings", "ObjectiveSettings"]


@dataclass(frozen=True)
class ObjectiveSettings:
    """Policy objective."""

    loss_type: str = "grpo"
    """A name of `LOSS_TYPES`, or ``path/to/file.py:function``, ``package.module:function``."""
    importance_sampling_level: str = "sequence"
    """`token`, `sequence`, `sequence_token` or `step`."""
    epsilon: float = 0.2
    """The ratio is clipped below at 1 - epsilon."""
    epsilon_high: float = 0.2
    """The ratio is clipped above at 1 + epsilon_high; for `cispo` the cap itself. `gmpo` clips the log ratio at
    -epsilon and epsilon_high."""
    delta: float = 0.0
    """Upper bound of the unclipped ratio where the advantage is negative (two-sided clipping); 0 = none."""
    importance_sampling_cap: float = 0.0
    """Largest importance weight between the weights that sampled and the old policy, where they are not the same
    (`LossInputs.behaviour_logp`); 0 = not weighed."""
    sapo_temperature_pos: float = 1.0
    """Temperature of SAPO's gate where the advantage is positive."""
    sapo_temperature_neg: float = 1.05
    """Temperature of SAPO's gate elsewhere."""
    beta: float = 0.0
    """Weight of the KL divergence to the reference."""
    kl_estimator: str = "k3"
    """`k1`, `k2` or `k3`."""
    kl_in: str = "loss"
    """`loss` (per token) or `reward` (subtracted from the rollout's reward before advantages)."""
    use_bias_correction_kl: bool = False
    """Whether a KL in the loss is weighted with the ratio, so that its gradient is that of KL(policy || reference)
    off-policy too; TRL's default is True. `k1` always is."""
    entropy_coef: float = 0.0
    """Weight of the mean entropy per token, which is maximised."""


@dataclass(frozen=True)
class AdvantageSettings:
    """How rewards become advantages."""

    advantages: str = "group_mean"
    """`group_mean`, `rloo`, `gdpo`, or a function of one's own by path."""
    scale_rewards: str = "none"
    """Divide by nothing (`none`), the `group`'s or the `batch`'s standard deviation; `gdpo` and one's own function
    scale by themselves and do not read it."""
    reward_scale: float = 1.0
    """Advantages are multiplied by it, after `scale_rewards`."""
    spread_tolerance: float = 0.0
    """Groups whose rewards differ by no more teach nothing."""
