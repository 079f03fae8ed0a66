"""What a recipe says about the policy update, as plain arguments."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_drive.training.guards import Limits

__all__ = ["TrainerSettings"]


@dataclass(frozen=True)
class TrainerSettings:
    """Plain arguments of the update; a recipe's `rl` section gives them."""

    max_steps: int
    """Length of the learning-rate schedule."""
    learning_rate: float
    """Peak learning rate."""
    weight_decay: float
    """AdamW's decoupled decay."""
    warmup_ratio: float
    """Share of steps spent warming up."""
    max_grad_norm: float
    """Gradients are scaled down to this norm."""
    num_iterations: int
    """Optimizer steps per batch of rollouts (TRL's mu)."""
    micro_batch_scenes: int
    """Scenes per backward pass; memory only, the update does not depend on it."""
    max_tokens_per_forward: int
    """Plan tokens per forward pass; 0 takes a micro-batch at once."""
    likelihood_steps: int
    """Decode steps looked at; 0 means all."""
    router: str
    """`free`, `frozen`, `record` or `replay`."""
    load_balance_coef: float
    """Weight of the experts' load-balance loss, a mean over micro-batches."""
    router_z_coef: float
    """Weight of the router z-loss, a mean over micro-batches."""
    bc_coef: float
    """Weight of the SFT loss on the human's plans."""
    sync_ref_model: bool
    """Whether the reference follows the policy."""
    ref_model_mixup_alpha: float
    """Share of the policy in a new reference."""
    ref_model_sync_steps: int
    """Steps between two updates of the reference."""
    ema_decay: float
    """Decay of the moving average of the weights; 0 keeps none."""
    recompute_old: bool
    """Whether old log-probabilities come from the trainer's first pass in place of the sampler's: where older weights
    may have sampled, or rounding is coarse. The objective is then told the sampler's too."""
    limits: Limits
    """How far a batch may move the policy."""
    seed: int = 0
    """Keys probes, decode steps and the masks of behaviour cloning."""

    @property
    def has_router_loss(self) -> bool:
        """Whether routers have a loss of their own."""
        return self.load_balance_coef > 0 or self.router_z_coef > 0
