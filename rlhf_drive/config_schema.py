"""What a recipe holds: frozen dataclasses, one per section, and the range of every number beside its type.

A recipe is one flat, complete YAML file. Every key without a default here must be given; a section that the job does
not use may be absent and is then None (:data:`SECTIONS` says which job uses which).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

__all__ = [
    "ACTION_TOKENS",
    "POLICY_FILE",
    "PROCESS_KEYS",
    "SECTIONS",
    "SOURCE_KEYS",
    "Bounds",
    "CompareSection",
    "LoggingSection",
    "PolicySection",
    "ProcessSection",
    "Recipe",
    "RewardGate",
    "RewardSection",
    "RewardTerm",
    "RlSection",
    "RolloutSection",
    "ScenesSection",
    "SftSection",
    "TokenizerSection",
]

ACTION_TOKENS = 16
"""L: tokens of a plan, 8 poses of two numbers each; a decode reveals at least one per step, so K <= L."""


POLICY_FILE = "policy.json"
"""A policy checkpoint is a folder with this file."""


@dataclass(frozen=True)
class Bounds:
    """Range of a number: ``low <= x <= high``, or strict where `open` says so."""

    low: float = float("-inf")
    """Smallest value."""
    high: float = float("inf")
    """Largest value."""
    open: Literal["", "low", "high", "both"] = ""
    """Which of the two ends is itself excluded."""

    def problem(self, value: float) -> str:
        """Empty when `value` lies inside, else what it should have been."""
        above = value > self.low if self.open in ("low", "both") else value >= self.low
        below = value < self.high if self.open in ("high", "both") else value <= self.high
        if above and below:
            return ""
        ends = []
        if self.low != float("-inf"):
            ends.append(f"{'greater than' if self.open in ('low', 'both') else 'at least'} {self.low:g}")
        if self.high != float("inf"):
            ends.append(f"{'less than' if self.open in ('high', 'both') else 'at most'} {self.high:g}")
        return f"must be {' and '.join(ends)}; got {value!r}"


Positive = Annotated[float, Bounds(0.0, open="low")]
NotNegative = Annotated[float, Bounds(0.0)]
Share = Annotated[float, Bounds(0.0, 1.0)]
OpenShare = Annotated[float, Bounds(0.0, 1.0, open="both")]
Count = Annotated[int, Bounds(1)]
CountOrZero = Annotated[int, Bounds(0)]
Order = Literal["causal", "reverse_causal", "random", "confidence", "all"]
_ABSENT: Any = None


@dataclass(frozen=True)
class ScenesSection:
    """Where the driving scenes come from, and how they are split."""

    source: Literal["generate", "recorded", "navsim", "store"]
    """`generate` by rule, import `recorded` driving or `navsim` metric caches, or open a `store` written before."""
    path: str | None
    """Folder of recordings or of metric caches (sources `recorded` and `navsim` only)."""
    store: str | None
    """Folder the scene store is written to, or lies in (source `store`); null = `scenes` in the run folder."""
    logs: str | None = None
    """Folder of NAVSIM logs, which hold the true observations (source `navsim` only)."""
    count: CountOrZero = 0
    """Scenes to generate (source `generate`)."""
    kinds: tuple[str, ...] = ()
    """Situation kinds to generate, in equal shares; empty = all (source `generate`)."""
    seed: CountOrZero = 0
    """Seed of the generator and of the split."""
    heldout_fraction: OpenShare = 0.2
    """Share of the clusters kept for comparison, never trained on; a cluster of related scenes is never divided."""
    starts: Literal["recommended", "moving", "all"] = "recommended"
    """Which start frames of a recording become scenes (source `recorded`)."""
    min_human_pdms: Share = 0.0
    """Scenes whose recorded driver scores less PDMS (0..1) are left out."""


@dataclass(frozen=True)
class TokenizerSection:
    """How a trajectory becomes numeric tokens."""

    encoding: Literal["displacements", "waypoints"]
    """What the numbers are: steps from pose to pose, or positions in the frame of t=0."""
    low: float
    """Smallest number a token stands for (m)."""
    high: float
    """Largest number a token stands for (m)."""
    step: Positive
    """Distance between two neighbouring tokens (m)."""


@dataclass(frozen=True)
class PolicySection:
    """Sizes of the sparse mixture-of-experts transformer."""

    d_model: Count
    """Width of a token vector."""
    num_heads: Count
    """Attention heads; divides `d_model`."""
    encoder_layers: Count
    """Blocks of the scene encoder."""
    decoder_layers: Count
    """Blocks of the trajectory decoder."""
    num_experts: Count
    """Routed experts of a feed-forward layer, beside the shared one."""
    experts_per_token: Count
    """Experts each token is routed to."""
    expert_dim: Count
    """Hidden width of an expert."""
    max_agents: Count
    """Nearest agents that become scene tokens; farther ones are not seen."""
    max_polylines: Count
    """Nearest map polylines that become scene tokens."""
    points_per_polyline: Annotated[int, Bounds(2)]
    """Points each polyline is resampled to."""
    dropout: Annotated[float, Bounds(0.0, 1.0, open="high")]
    """Dropout probability during SFT; RL runs without, so that the likelihood is exact."""
    routing: Literal["token_choice", "expert_choice"] = "token_choice"
    """Who chooses: each token its experts, or each expert its tokens among those of one plan."""
    capacity_factor: Annotated[float, Bounds(0.0, 1.0, open="low")] = 0.25
    """Share of a plan's tokens each expert takes (`expert_choice`)."""


@dataclass(frozen=True)
class ProcessSection:
    """How tokens are decoded."""

    name: Literal["masked", "flow", "autoregressive"]
    """`masked`: masked diffusion, from all-masked to a full plan; `flow`: discrete flow matching, from noise to a plan;
    `autoregressive`: token after token."""
    beta_scale: Positive = 3.0
    """c of the flow's path, ``beta_t = c (t / (1 - t))^a`` (process `flow`)."""
    beta_power: Positive = 0.9
    """a of the flow's path (process `flow`)."""
    distance_scale_m: Positive = 4.0
    """Numbers further apart than about this are equally far (m); nearer ones are told apart (process `flow`)."""


@dataclass(frozen=True)
class SftSection:
    """Supervised training on the recorded or expert trajectory."""

    policy: str | None
    """Checkpoint to start from; null = random weights."""
    max_epochs: Count
    """Passes over the training scenes at most; `patience` ends it earlier."""
    batch_size: Count
    """Scenes per update."""
    learning_rate: Positive
    """Peak learning rate of AdamW."""
    weight_decay: NotNegative
    """Decoupled weight decay."""
    warmup_ratio: Share
    """Share of the updates with a linearly rising learning rate; a cosine to zero follows."""
    max_grad_norm: Positive
    """Gradients are scaled down to this norm."""
    mask_order: Literal["random", "causal", "reverse_causal", "mixed"]
    """Which positions are hidden: any (`random`, the masked-diffusion bound), those that a decoding order reveals last
    (`causal`, `reverse_causal`), or half random and half causal (`mixed`)."""
    mirror: bool
    """Whether scenes are mirrored left-right at random."""
    load_balance_coef: NotNegative
    """Weight of the loss that spreads tokens over experts."""
    router_z_coef: NotNegative
    """Weight of the loss that keeps router logits small."""
    patience: Count
    """Epochs without a lower held-out loss after which training stops; the best epoch is kept."""
    save_steps: Count
    """Updates between two checkpoints that a killed run can resume from."""


@dataclass(frozen=True)
class RewardGate:
    """One factor of the reward."""

    name: str
    """As for a term."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Keyword options of the function."""


@dataclass(frozen=True)
class RewardTerm:
    """One term of the reward."""

    name: str
    """A registered reward (`rlhf-drive rewards list`), `path/to/file.py:function` or `package.module:function`."""
    weight: NotNegative
    """Weight in the mean over the terms; 0 = the term is only reported."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Keyword options of the function."""


@dataclass(frozen=True)
class RewardSection:
    """What RL maximises: the product of the gates times the weighted mean of the terms."""

    scorer: str
    """Simulator score whose components gates and terms use: `pdms` (NAVSIM v1.1), `epdms` (v2.2), or
    `path/to/file.py:function` of one's own."""
    scorer_options: Mapping[str, object]
    """Options of the scorer, such as ``{human_filter: on}`` for `epdms`."""
    gates: tuple[RewardGate, ...]
    """Factors of the mean; may be empty."""
    terms: tuple[RewardTerm, ...]
    """At least one term."""
    engine: Literal["local", "ray"]
    """`local`: threads of this process; `ray`: actors, on this machine or on the cluster that RAY_ADDRESS names."""
    workers: CountOrZero
    """Threads or actors that score; 0 = one per usable core."""
    timeout_s: NotNegative
    """Time a function of yours may take for one row before the row is given up (s); 0 = no limit."""
    max_invalid_fraction: Share
    """The run stops when a larger share of a step's rollouts cannot be scored."""


@dataclass(frozen=True)
class RolloutSection:
    """How groups of trajectories are sampled for RL."""

    num_generations: Annotated[int, Bounds(2)]
    """G: trajectories per scene; an advantage compares them, so at least 2."""
    scenes_per_step: Count
    """S: scenes per RL step."""
    scenes_per_chunk: Count
    """Scenes sampled at once, all of a step at most; those sampled before are scored meanwhile."""
    previous_plan: Literal["none", "human", "sampled"]
    """Plan of the frame 0.5 s earlier, for two-frame comfort: none, the human's drive as a stand-in, or one sampled
    from the policy for each scene."""
    steps: Annotated[int, Bounds(1, ACTION_TOKENS)]
    """K: decode steps."""
    order: Order
    """Which positions are decided first; none depends on the weights through the sampled token. `causal` for an
    autoregressive policy, `all` (every position at every step) for a flow."""
    temperature: Positive
    """Divides the logits. Greedy sampling (0) leaves a group without spread, so it must be positive."""
    top_k: CountOrZero
    """Sample among the k most probable tokens; 0 = all."""


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


@dataclass(frozen=True)
class CompareSection:
    """Evaluation on the held-out scenes."""

    policies: Mapping[str, str]
    """Checkpoint by the name the report shows; a pipeline adds the policies it trained."""
    baselines: tuple[Literal["human", "pdm_closed", "constant_velocity", "stand_still"], ...]
    """Planners that need no training."""
    metrics: tuple[Literal["pdms", "epdms"], ...]
    """Scores reported, the headline first; with `epdms` the plans of the previous frame are made too."""
    samples: Count
    """Trajectories per scene and policy; the score of a scene is their mean."""
    steps: Annotated[int, Bounds(1, ACTION_TOKENS)]
    """Decode steps."""
    order: Order
    """Which positions are revealed first."""
    temperature: NotNegative
    """Divides the logits; 0 = greedy."""
    top_k: CountOrZero
    """Sample among the k most probable tokens; 0 = all."""
    bootstrap_samples: Count
    """Resamples of the held-out clusters behind each interval."""
    confidence: OpenShare
    """Coverage of the intervals, such as 0.95."""
    pictures: CountOrZero
    """Pictures of the scenes on which the policies differ most."""
    seed: CountOrZero
    """Seed of sampling and bootstrap."""


@dataclass(frozen=True)
class LoggingSection:
    """What is written beside `metrics.jsonl`."""

    tensorboard: bool
    """Whether TensorBoard logs are written."""


@dataclass(frozen=True)
class Recipe:
    """A whole recipe. A section is None where the job does not use it; validation makes sure of the others."""

    job: Literal["pipeline", "scenes", "sft", "rl", "compare"]
    """What is done: one of the single jobs, or `pipeline`, all of them in turn."""
    name: str
    """Name of the run folder: letters, digits, `-`, `_` and `.`."""
    description: str
    """What the recipe is for, in a line."""
    seed: CountOrZero
    """Seed of initialisation, batches and SFT."""
    output_dir: str
    """Folder that run folders are made in."""
    device: Literal["auto", "cpu", "cuda"]
    """Where the policy runs; `auto` takes a GPU if there is one."""
    scenes: ScenesSection = _ABSENT
    """Driving scenes."""
    tokenizer: TokenizerSection = _ABSENT
    """Trajectory tokens."""
    policy: PolicySection = _ABSENT
    """Network sizes."""
    process: ProcessSection = _ABSENT
    """Decoding process."""
    sft: SftSection = _ABSENT
    """Supervised training."""
    reward: RewardSection = _ABSENT
    """Reward."""
    rollout: RolloutSection = _ABSENT
    """Sampling for RL."""
    rl: RlSection = _ABSENT
    """RL training."""
    compare: CompareSection = _ABSENT
    """Evaluation."""
    logging: LoggingSection = _ABSENT
    """Logs."""


SOURCE_KEYS: Mapping[str, tuple[str, ...]] = {
    "generate": ("count", "kinds", "seed", "heldout_fraction", "min_human_pdms"),
    "recorded": ("seed", "heldout_fraction", "starts", "min_human_pdms"),
    "navsim": ("seed", "heldout_fraction", "min_human_pdms"),
    "store": (),
}
"""Keys of section `scenes` that must be given for each source, beside source, path and store."""

PROCESS_KEYS: Mapping[str, tuple[str, ...]] = {
    "masked": (),
    "flow": ("beta_scale", "beta_power", "distance_scale_m"),
    "autoregressive": (),
}
"""Keys of section `process` that must be given for each process, and are refused for the others."""

SECTIONS: Mapping[str, tuple[str, ...]] = {
    "pipeline": (
        *("scenes", "tokenizer", "policy", "process", "sft"),
        *("reward", "rollout", "rl", "compare", "logging"),
    ),
    "scenes": ("scenes",),
    "sft": ("scenes", "tokenizer", "policy", "process", "sft", "logging"),
    "rl": ("scenes", "reward", "rollout", "rl", "logging"),
    "compare": ("scenes", "reward", "compare"),
}
"""Sections each job uses: these must be there, and no others."""
