"""From sizes, a machine and a layout to the time, memory and bottleneck of an RL step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_drive.estimate.counts import Parameters, count_parameters
from rlhf_drive.estimate.layout import NODE, Layout
from rlhf_drive.estimate.machine import Machine
from rlhf_drive.estimate.memory import Memory, checkpoint_bytes, experience_bytes, sampler_memory, trainer_memory
from rlhf_drive.estimate.sizes import NetworkSizes, StepSizes
from rlhf_drive.estimate.work import micro_batches, reference_work, sampling_work, update_work

__all__ = ["Prediction", "Workload", "predict"]

CACHED_FEATURES = 512 * 2**20 // 30_000
"""Scenes whose network inputs are remembered by a process."""
RAY_CALL_S = 2e-3
"""Of handing a chunk to an actor and taking its answer."""


@dataclass(frozen=True)
class Workload:
    """What is asked for."""

    net: NetworkSizes
    """The policy."""
    step: StepSizes
    """An RL step."""
    scenes: int
    """Training scenes."""
    max_steps: int
    """RL steps."""
    flat: float = 0.0
    """Share of the groups whose rewards do not differ: they are sampled and scored, but not learned from."""

    @property
    def new_share(self) -> float:
        """Share of a step's scenes that no process has met before, over the whole run."""
        met = self.max_steps * self.step.scenes
        return 1.0 if self.scenes > CACHED_FEATURES else min(1.0, self.scenes / met)


@dataclass(frozen=True)
class Prediction:
    """What a step costs. Seconds are a step's; those that overlap do not add up to `step_s`."""

    parts: Mapping[str, float]
    """Seconds by part: `push`, `sampling`, `scoring` (what is waited for, after the last plan), `gather`, `reference`,
    `likelihood`, `update`, `exchange` (gradients and sharded weights), `monitors`."""
    step_s: float
    """Of a step, as ``time/step_s``."""
    train_side_s: float
    """Of what the training processes do in it."""
    sample_side_s: float
    """Of pushing, sampling and scoring a step's plans."""
    scoring_busy_s: float
    """All scoring of a step, added up over workers."""
    checkpoint_s: float
    """Of writing a checkpoint, which a step's time leaves out."""
    idle: Mapping[str, float]
    """Share of a step in which `trainers`, `samplers` and `scorers` wait."""
    trainer: Memory
    """Of the fullest training process."""
    sampler: Memory | None
    """Of a rollout worker."""
    push_bytes: float
    """Sent to each node for new weights."""
    gather_bytes: float
    """Rollouts that every training process is sent."""
    checkpoint_size: float
    """Bytes on disk."""
    params: Parameters
    """Of the policy."""
    bottleneck: str
    """The part that takes longest, or the side that the others wait for."""
    advice: str
    """What to do about it, in a line."""
    warnings: tuple[str, ...]
    """Where the design stops."""
    scenes_per_s: float
    """Scenes sampled and learned from."""
    rollouts_per_s: float
    """Plans."""
    run_s: float
    """All RL steps, with checkpoints."""


def predict(work: Workload, machine: Machine, layout: Layout) -> Prediction:
    """What an RL step of `work` takes on `machine`, spread as `layout` says."""
    net, step = work.net, work.step
    params = parameters_of(net, step)
    kept = step.scenes * (1.0 - work.flat)
    sampling, waiting, scoring_busy = _collect(work, machine, layout)
    parts = {
        "push": _push_s(params, machine, layout),
        "sampling": sampling,
        "scoring": waiting,
        "gather": _gather_s(net, step, machine, layout),
        **_train(work, machine, layout, kept, params),
        "monitors": _monitors_s(work, machine, layout),
    }
    # Other processes sample and score meanwhile, where there are any and the recipe lets them.
    sample_side = parts["push"] + sampling + waiting
    train_side = sum(parts[name] for name in ("gather", "reference", "likelihood", "update", "exchange", "monitors"))
    overlaps = step.staleness > 0 and layout.samplers > 0
    step_s = max(sample_side, train_side, 1e-9) if overlaps else max(sample_side + train_side, 1e-9)
    scorers = layout.scorers or machine.cores
    idle = {"trainers": 1.0 - (train_side if layout.samplers else step_s - waiting) / step_s}
    if layout.samplers:
        busy = _chunk_s(work, machine) * step.scenes / step.chunk / layout.samplers
        idle["samplers"] = 1.0 - min(1.0, busy / step_s)
    idle["scorers"] = 1.0 - min(1.0, scoring_busy / scorers / step_s)
    element = 2 if layout.bfloat16 else 4
    trainer = trainer_memory(
        net, params, step, processes=layout.trainers, sharded=layout.sharded and layout.trainers > 1, element=element,
        samples=layout.samplers == 0,
    )  # fmt: skip
    sampler = sampler_memory(net, params, step, element=element) if layout.samplers else None
    bottleneck, advice = _advice(work, machine, layout, parts, sample_side, train_side, overlaps, scoring_busy)
    checkpoint = checkpoint_bytes(params, step) / machine.disk
    run_s = work.max_steps * (step_s + checkpoint / step.save_every)
    return Prediction(
        parts=parts, step_s=step_s, train_side_s=train_side, sample_side_s=sample_side, scoring_busy_s=scoring_busy,
        checkpoint_s=checkpoint, idle=idle, trainer=trainer, sampler=sampler,
        push_bytes=4.0 * params.pushed if layout.samplers else 0.0, gather_bytes=experience_bytes(net, step),
        checkpoint_size=checkpoint_bytes(params, step), params=params, bottleneck=bottleneck, advice=advice,
        warnings=_warnings(work, machine, layout, trainer, params),
        scenes_per_s=step.scenes / step_s, rollouts_per_s=step.rows / step_s, run_s=run_s,
    )  # fmt: skip


def parameters_of(net: NetworkSizes, step: StepSizes) -> Parameters:
    """Parameters of a policy as the step trains it."""
    return count_parameters(
        net, lora_rank=step.lora_rank, lora_experts=step.lora_experts, frozen_router=step.frozen_router
    )


def _chunk_s(work: Workload, machine: Machine) -> float:
    """Sampling one chunk, with the network inputs of scenes not met before."""
    step = work.step
    seconds = machine.seconds(sampling_work(work.net, step, step.chunk))
    if step.two_frames:
        seconds += machine.seconds(sampling_work(work.net, step, step.chunk, 1))
    return seconds + work.new_share * step.chunk * machine.rates["features"].unit_s


def _collect(work: Workload, machine: Machine, layout: Layout) -> tuple[float, float, float]:
    """Seconds of sampling, of waiting for scores after it, and of scoring added up over workers."""
    step = work.step
    chunks = math.ceil((1.0 + step.refill * (work.flat > 0)) * step.scenes / step.chunk)
    per_chunk = _chunk_s(work, machine) + (RAY_CALL_S if layout.samplers else 0.0)
    rounds = math.ceil(chunks / layout.chunk_takers)
    sampling = rounds * per_chunk
    rows = step.chunk * step.group
    prepare = work.new_share * step.chunk * machine.prepare_s
    work_s = machine.score.fixed_s + rows * machine.score.unit_s + prepare
    if layout.scorers:
        speed = float(layout.scorers)
    else:
        # Chunks of all processes are scored by the cores of their own node.
        speed = machine.core_gain * (layout.nodes if layout.trainers > NODE else 1)
    busy = chunks * work_s
    # A round's plans are scored while the next is sampled: the longer of the two sets the pace.
    of_round = min(chunks, layout.chunk_takers) * work_s / speed
    waiting = of_round + max(0.0, (rounds - 1) * (of_round - per_chunk))
    return sampling, waiting, busy


def _train(work: Workload, machine: Machine, layout: Layout, kept: float, params: Parameters) -> dict[str, float]:
    """Reference, likelihood, update and exchange of a step."""
    net, step = work.net, work.step
    scenes = min(float(step.micro_scenes), max(kept, 1.0))
    # Micro-batches of the process that has most, the last of which may be smaller.
    parts = micro_batches(step, kept, layout.trainers)
    if layout.trainers == 1:
        parts = kept / scenes
    share = parts * scenes
    seconds = {name: machine.seconds(calls) for name, calls in update_work(net, step, parts, scenes).items()}
    if layout.samplers or layout.trainers > 1:
        # Scenes that another process has sampled are new to this one.
        seconds["likelihood"] += work.new_share * share * machine.rates["features"].unit_s
    reference = 0.0
    if step.reference:
        everyone = micro_batches(step, step.scenes, layout.trainers) * scenes if step.penalty else share
        # A penalty also needs the old log-probabilities where the sampler's do not serve.
        passes = 2 if step.penalty and (step.staleness > 0 or layout.bfloat16) else 1
        reference = passes * machine.seconds(reference_work(net, step, everyone))
    exchange = _exchange_s(params, machine, layout, step, parts)
    if not kept:
        seconds, reference, exchange = dict.fromkeys(seconds, 0.0), 0.0, 0.0
    return {"reference": reference, **seconds, "exchange": exchange}


def _wire(machine: Machine, processes: int) -> float:
    """Bytes a second of a collective's slowest link."""
    return machine.link if processes <= NODE else machine.network


def _exchange_s(params: Parameters, machine: Machine, layout: Layout, step: StepSizes, parts: float) -> float:
    """Gradients added up over processes once an update; with FSDP2 weights are gathered for both passes of each
    micro-batch, and for sampling."""
    n = layout.trainers
    if n == 1:
        return 0.0
    ring, wire = (n - 1) / n, _wire(machine, n)
    latency = machine.message_s * math.log2(n)
    gradients = 4.0 * params.trained
    if not layout.sharded:
        return step.iterations * (2 * ring * gradients / wire + latency)
    weights = 4.0 * params.total  # made whole in float32
    gathers = 2 * parts * step.iterations + 1  # and once to sample from, or to push
    return gathers * (ring * weights / wire + latency) + step.iterations * parts * (ring * gradients / wire)


def _push_s(params: Parameters, machine: Machine, layout: Layout) -> float:
    """New weights to samplers: one copy into the object store, to all nodes by way of each other, and out again."""
    if not layout.samplers:
        return 0.0
    size = 4.0 * params.pushed
    nodes = math.ceil(layout.samplers / NODE) if not layout.shared_gpu else 1
    hops = math.ceil(math.log2(nodes + 1)) if nodes > 1 else 0
    gathered = size / _wire(machine, layout.trainers) if layout.sharded and layout.trainers > 1 else 0.0
    return gathered + 2 * size / machine.host_copy + hops * size / machine.network + RAY_CALL_S


def _gather_s(net: NetworkSizes, step: StepSizes, machine: Machine, layout: Layout) -> float:
    """Every process is sent all rollouts, pickled, over the host's network."""
    n = layout.trainers
    if n == 1:
        return 0.0
    size = experience_bytes(net, step)
    wire = machine.host_copy if n <= NODE else min(machine.host_copy, machine.network)
    return size / wire + 2 * size / machine.host_copy + n * machine.message_s


def _monitors_s(work: Workload, machine: Machine, layout: Layout) -> float:
    """Statistics of each step's plans, and held-out scenes driven and scored every so often."""
    step, seconds = work.step, machine.monitor.seconds(1, work.step.rows)
    if step.monitor_every:
        driven = 2 * machine.seconds(sampling_work(work.net, step, step.monitor_scenes, 1))
        driven += machine.heldout.seconds(1, step.monitor_scenes)
        seconds += driven / step.monitor_every
    return seconds


def _advice(
    work: Workload,
    machine: Machine,
    layout: Layout,
    parts: Mapping[str, float],
    sample_side: float,
    train_side: float,
    overlaps: bool,
    scoring_busy: float,
) -> tuple[str, str]:
    """What limits, and what would help."""
    step, longest = work.step, max(parts, key=lambda name: parts[name])
    if parts["scoring"] > 0.25 * (sample_side + train_side) or (overlaps and parts["scoring"] > train_side):
        target = max(parts["sampling"], 0.1 * train_side)
        more = max(1, math.ceil(scoring_busy / target)) - (layout.scorers or round(machine.core_gain))
        if more > 0:
            return "scoring", f"scoring limits: {more} more reward workers would balance it with sampling"
    batches = math.ceil(step.scenes * (1.0 - work.flat) / step.micro_scenes)
    if layout.trainers > batches:
        return "too few micro-batches", (
            f"{batches} micro-batches feed {layout.trainers} training processes: raise rollout.scenes_per_step to "
            f"{layout.trainers * step.micro_scenes} or lower rl.micro_batch_scenes"
        )
    if overlaps:
        if sample_side > 1.1 * train_side and parts["push"] > 0.5 * sample_side:
            return "push", "pushing weights limits: LoRA sends adapters alone, or push less often (a larger step)"
        if sample_side > 1.1 * train_side:
            wanted = math.ceil(layout.samplers * sample_side / train_side)
            return "samplers", f"training waits for plans: about {wanted} rollout workers would keep up"
        share = sample_side / train_side
        return "trainers", f"training limits; samplers need {share:.0%} of its time, fewer of them would do"
    if layout.samplers and step.staleness == 0:
        hidden = min(sample_side, train_side)
        return (
            longest,
            f"sampling and training take turns; rollout.max_staleness: 1 would hide {hidden:.3g} s of a step",
        )
    if longest == "exchange":
        return longest, "exchange of weights limits: fewer micro-batches (larger rl.micro_batch_scenes), or LoRA"
    takers = math.ceil(step.scenes / step.chunk)
    if longest == "sampling" and takers < layout.chunk_takers:
        return longest, f"{takers} chunks feed {layout.chunk_takers} samplers: lower rollout.scenes_per_chunk"
    hints = {
        "sampling": "sampling limits: fewer rollout.steps (masked, flow), or rollout workers of its own",
        "update": "gradients limit: fewer rl.num_iterations, or more training processes",
        "likelihood": "the likelihood limits: rl.likelihood_steps below rollout.steps, or more training processes",
        "reference": "the reference limits: rl.beta: 0 leaves it out",
        "gather": "gathering rollouts on every process limits: fewer training processes with larger micro-batches",
        "push": "pushing weights limits: LoRA sends adapters alone",
        "monitors": "watching held-out scenes limits: raise rl.monitor_steps",
        "scoring": "scoring limits: more reward workers",
    }
    return longest, hints[longest]


def _warnings(work: Workload, machine: Machine, layout: Layout, trainer: Memory, params: Parameters) -> tuple[str, ...]:
    """Where the layout cannot work, or wastes most of what it has."""
    found, step = [], work.step
    if machine.memory and trainer.total > machine.memory:
        cure = "LoRA" if layout.sharded else "parallel.strategy: fsdp2, or LoRA"
        found.append(
            f"a training process needs {trainer.total / 1e9:.3g} GB and there are {machine.memory / 1e9:.3g}: {cure}"
        )
    chunks = math.ceil(step.scenes / step.chunk)
    if chunks < layout.chunk_takers:
        found.append(f"{chunks} chunks for {layout.chunk_takers} processes that sample: lower rollout.scenes_per_chunk")
    batches = math.ceil(step.scenes * (1.0 - work.flat) / step.micro_scenes)
    if 0 < batches < layout.trainers:
        found.append(f"{batches} micro-batches for {layout.trainers} training processes: the others wait")
    if layout.samplers and 4.0 * params.pushed > 8e9:
        found.append(f"{4e-9 * params.pushed:.3g} GB of weights pass through the main process every step: use LoRA")
    return tuple(found)
