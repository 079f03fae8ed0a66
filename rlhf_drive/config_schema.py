"""What a recipe holds: frozen dataclasses, one per section, and the range of every number beside its type.

A recipe is one flat, complete YAML file. Every key without a default here must be given; a section that the job does
not use may be absent and is then None (:data:`SECTIONS` says which job uses which).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from rlhf_drive.config_ranges import (
    ACTION_TOKENS,
    Bounds,
    Count,
    CountOrZero,
    NotNegative,
    OpenShare,
    Order,
    Positive,
    Share,
)
from rlhf_drive.config_rl import RlSection

__all__ = [
    "ACTION_TOKENS",
    "POLICY_FILE",
    "PROCESS_KEYS",
    "SECTIONS",
    "SOURCE_KEYS",
    "Bounds",
    "CompareSection",
    "LoggingSection",
    "ParallelSection",
    "PolicySection",
    "ProcessSection",
    "RaySection",
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

POLICY_FILE = "policy.json"
"""A policy checkpoint is a folder with this file."""


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
    micro_batch_scenes: CountOrZero
    """Scenes per backward pass; 0 = the whole batch at once. Masks are drawn and routers balanced per micro-batch, so
    that training depends on it, but not on the number of processes that share the micro-batches."""
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

    engine: Literal["local", "ray"]
    """`local`: the processes that train sample too; `ray`: actors, each with a copy of the policy."""
    workers: Count
    """Actors that sample (engine `ray`)."""
    cpus_per_worker: Positive
    """Cores that Ray sets aside for each, and threads that it computes with (engine `ray`)."""
    gpus_per_worker: NotNegative
    """GPUs for each, also parts of one such as 0.5; 0 = it samples on its cores (engine `ray`)."""
    timeout_s: Positive
    """Time for a chunk, after which it is sampled again by another worker in place of the slow one (engine `ray`)."""
    max_staleness: CountOrZero
    """Updates of the policy by which the weights that sampled may be behind. 0: sampling and training take turns, and a
    run can be repeated bit for bit; above, they overlap (engine `ray`)."""
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
    trackio: bool
    """Whether metrics go to Trackio too."""
    wandb: bool
    """Whether metrics go to Weights & Biases too."""
    project: str
    """Project that the run belongs to in Trackio and Weights & Biases."""
    picture_steps: CountOrZero
    """RL steps between two pictures of sampled groups, in `pictures` of the stage; 0 = none."""
    picture_scenes: Count
    """Scenes in each picture."""
    profile_steps: tuple[Count, ...]
    """RL steps, counted from 1, of which a profile is written to `profiles` of the stage."""


@dataclass(frozen=True)
class ParallelSection:
    """How training is spread over the processes that were launched."""

    strategy: Literal["ddp", "fsdp2"]
    """`ddp`: each process holds all weights; `fsdp2`: weights, gradients and optimizer are divided among them."""
    precision: Literal["float32", "bfloat16"]
    """Of matrix products in forward passes, sampling included; weights, optimizer and log-probabilities stay
    float32."""
    timeout_s: Positive
    """How long a process waits for the others before it ends the run with an error (s)."""


@dataclass(frozen=True)
class RaySection:
    """The cluster that engine `ray` works on."""

    address: str | None
    """``host:port`` of a cluster, or `auto`; null = the one that RAY_ADDRESS names, else one on this machine that the
    run starts and stops itself."""
    placement: Literal["spread", "pack"]
    """Whether workers go to as many machines as possible, or to as few."""


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
    parallel: ParallelSection = _ABSENT
    """Processes that train."""
    ray: RaySection = _ABSENT
    """Cluster."""


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
        *("reward", "rollout", "rl", "compare", "logging", "parallel", "ray"),
    ),
    "scenes": ("scenes",),
    "sft": ("scenes", "tokenizer", "policy", "process", "sft", "logging", "parallel"),
    "rl": ("scenes", "reward", "rollout", "rl", "logging", "parallel", "ray"),
    "compare": ("scenes", "reward", "compare", "ray"),
}
"""Sections each job uses: these must be there, and no others."""
