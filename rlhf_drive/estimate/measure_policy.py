"""The policy's pieces, as calls to be timed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhf_drive.config import Recipe
from rlhf_drive.estimate.memory import decode_passes
from rlhf_drive.estimate.sizes import NetworkSizes, StepSizes
from rlhf_drive.estimate.work import sampling_work, update_work
from rlhf_drive.likelihood.scoring import LOGITS_LIMIT, score_draws
from rlhf_drive.objectives import LossInputs, count_denominators, make_objective
from rlhf_drive.policies import Policy
from rlhf_drive.policies.lora import LoraSettings, add_lora
from rlhf_drive.policies.masked import draw
from rlhf_drive.policies.transformer import SceneContext
from rlhf_drive.scenes import Scene
from rlhf_drive.training.build import build_policy, objective_settings
from rlhf_drive.training.routing import freeze_router

__all__ = ["PolicyPieces"]

MOST_STATES, MOST_SCENES, MOST_POSITIONS = 256, 32, 4096
"""Largest calls that are timed; larger ones are extrapolated."""
SMALL = 4
"""The smaller of a piece's two calls is so many times smaller."""

Item = tuple[str, float, Callable[[], object]]


@dataclass(frozen=True)
class _States:
    """Plan states against encoded scenes."""

    state: Tensor
    time: Tensor
    where: Tensor
    context: SceneContext


class PolicyPieces:
    """A fresh policy of the recipe, and its pieces at the sizes that the recipe calls them with."""

    def __init__(
        self,
        recipe: Recipe,
        net: NetworkSizes,
        step: StepSizes,
        scenes: list[Scene],
        device: torch.device,
        *,
        clock: Callable[[], float] = time.perf_counter,
        policy: Policy | None = None,
    ) -> None:
        """Pieces of the recipe's policy, or of a copy of `policy`."""
        self.net, self.step, self.device, self._clock = net, step, device, clock
        self.policy = _policy(recipe, step, device, policy)
        self.count = sum(p.numel() for p in self.policy.parameters())
        self._features = [self.policy.features(scene.observation) for scene in scenes]
        self._objective = make_objective(objective_settings(recipe.rl))
        self._trained = [p for p in self.policy.parameters() if p.requires_grad]
        self._max_norm = recipe.rl.max_grad_norm

    def timed(self) -> Iterator[Item]:
        """Every piece at two sizes."""
        sampling = {part.piece: part for part in sampling_work(self.net, self.step, self.step.chunk)}
        update = {part.piece: part for part in update_work(self.net, self.step, 1, self.step.micro_scenes)["update"]}
        micro, states = self.step.micro_scenes, update["decode_backward"].units
        for scenes in _sizes(self.step.chunk, MOST_SCENES):
            yield "encode", scenes, partial(self._encode, scenes)
        for scenes in _sizes(max(micro, 4), MOST_SCENES):
            yield from self._both_ways("encode", scenes, partial(self._context_sum, scenes))
        for count in _sizes(states, MOST_STATES):
            inputs = self._states(count, micro)
            yield from self._both_ways("decode", count, partial(self._decode, inputs))
        yield from self._sampling(sampling["draw"].units)
        yield from self._heads(update["logp_backward"].units)
        rows = micro * self.step.group
        yield "objective", rows, partial(self._loss, rows)
        yield "optimizer", 1, self._optimizer()

    def _sampling(self, positions: float) -> Iterator[Item]:
        rows, group = self.step.chunk * self.step.group, self.step.group
        for count in _sizes(rows, MOST_STATES):
            inputs = self._states(count, max(1, round(count / group)))
            if self.net.process == "autoregressive":
                yield "next", count, partial(self._next, inputs)
            yield "decode", count, partial(self._without_gradient, partial(self._decode, inputs))
        for count in _sizes(positions, MOST_POSITIONS):
            features, uniform = self._head_inputs(count), torch.rand(round(count), device=self.device)
            yield "draw", count, partial(self._draw, features, uniform)

    def _heads(self, positions: float) -> Iterator[Item]:
        limit = LOGITS_LIMIT // self.net.vocabulary
        for count in _sizes(min(positions, max(1, limit)), MOST_POSITIONS):
            features = self._head_inputs(count)
            action = torch.randint(0, self.net.vocabulary, (round(count),), device=self.device)
            for name, entropy in (("logp", False), ("entropy", True)):
                call = self._scorer(features, action, entropy)
                if name == "logp":
                    yield "logp", count, partial(self._without_gradient, call)
                    yield from self._both_ways(name, count, call)
                else:
                    yield "entropy_forward", count, call

    def _scorer(self, features: Tensor, action: Tensor, entropy: bool) -> Callable[[], Tensor]:
        return lambda: score_draws(self.policy, features, action, 1.0, 0, entropy=entropy)[0].sum()

    def _both_ways(self, name: str, units: float, loss: Callable[[], Tensor]) -> Iterator[Item]:
        def backward() -> float:
            found = loss()
            start = self._clock()
            found.backward()  # type: ignore[no-untyped-call]
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return self._clock() - start

        yield f"{name}_forward", units, loss
        yield f"{name}_backward", units, backward

    @torch.no_grad()
    def _without_gradient(self, call: Callable[[], object]) -> object:
        return call()

    @torch.no_grad()
    def _encode(self, scenes: float) -> object:
        return self._context(scenes)

    def _context(self, scenes: float) -> SceneContext:
        from rlhf_drive.policies.inputs import stack_features

        rows = [self._features[i % len(self._features)] for i in range(max(1, round(scenes)))]
        return self.policy.encode(stack_features(rows).to(self.device))

    def _context_sum(self, scenes: float) -> Tensor:
        context = self._context(scenes)
        return torch.stack([part.sum() for part in (*context.keys, *context.values, context.summary)]).sum()

    @torch.no_grad()
    def _states(self, states: float, scenes: float) -> _States:
        """Partly decided plans over so many scenes, the same number of states for each."""
        scenes = max(1, min(round(scenes), round(states)))
        count = scenes * max(1, round(states / scenes))
        generator = torch.Generator().manual_seed(0)
        middle = self.net.vocabulary // 4
        state = torch.randint(0, max(1, middle), (count, self.net.length), generator=generator).to(self.device)
        if self.net.process == "masked":
            hidden = torch.rand(state.shape, generator=generator) < 0.5
            state = torch.where(hidden.to(self.device), self.net.vocabulary, state)
        everywhere = torch.ones_like(state, dtype=torch.bool)
        context = self._context(scenes)
        return _States(state, torch.full((count,), 0.5, device=self.device), everywhere, context)

    def _decode(self, inputs: _States) -> Tensor:
        return self.policy.action_features(inputs.state, inputs.time, inputs.context, inputs.where).sum()

    @torch.no_grad()
    def _next(self, inputs: _States) -> float:
        """Seconds a position, of a whole continuation without its head."""
        past: list[list[Tensor]] = [[] for _ in inputs.context.keys]
        passes, policy = decode_passes(self.net, self.step), self.policy
        start = self._clock()
        for position in range(passes):
            policy.decoder.next(inputs.state, position, policy.values, inputs.context, past, None)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (self._clock() - start) / passes

    def _head_inputs(self, positions: float) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(max(1, round(positions)), self.net.width + 1, generator=generator)
        return features.to(self.device).requires_grad_()

    @torch.no_grad()
    def _draw(self, features: Tensor, uniform: Tensor) -> object:
        return draw(self.policy.logits(features), uniform, 1.0, 0)

    def _loss(self, rows: int) -> object:
        """The objective and its gradient on log-probabilities."""
        slots = self.net.length * (1 if self.net.process == "autoregressive" else decode_passes(self.net, self.step))
        old = -torch.rand(rows, slots, device=self.device)
        logp = (old + 0.01 * torch.rand_like(old)).requires_grad_()
        mask = torch.rand_like(old) < (1.0 if self.net.process == "flow" else 1.0 / max(1, slots // self.net.length))
        inputs = LossInputs(
            logp=logp, old_logp=old, ref_logp=old, advantages=torch.randn(rows, device=self.device), mask=mask,
            group_size=self.step.group, entropy=torch.rand_like(old),
            step_of=torch.arange(slots, device=self.device) // self.net.length,
        )  # fmt: skip
        outputs = self._objective(inputs, count_denominators(mask, max_length=slots))
        return outputs.loss.backward()  # type: ignore[no-untyped-call]

    def _optimizer(self) -> Callable[[], object]:
        optimizer = torch.optim.AdamW(self._trained, lr=1e-9)

        def update() -> float:
            for parameter in self._trained:
                parameter.grad = torch.ones_like(parameter)
            start = self._clock()
            torch.nn.utils.clip_grad_norm_(self._trained, self._max_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return self._clock() - start

        return update


def _policy(recipe: Recipe, step: StepSizes, device: torch.device, given: Policy | None) -> Policy:
    """The policy as RL trains it; its weights are fresh where none is given, its sizes the recipe's."""
    if given is not None:
        policy = copy.deepcopy(given)
    elif recipe.rl.policy and not recipe.policy:
        from rlhf_drive.policies import load_policy

        policy = load_policy(recipe.rl.policy, device=device)
    else:
        policy = build_policy(recipe, device)
    policy.eval()
    if step.lora_rank:
        policy = add_lora(policy, LoraSettings(step.lora_rank, recipe.rl.lora_alpha, step.lora_experts))
    elif step.frozen_router:
        freeze_router(policy)
    policy.decoder.checkpointing = False  # computing layers again is counted, not measured
    return policy


def _sizes(wanted: float, most: int) -> list[float]:
    """Two sizes of call: the wanted one, or the most that is timed, and a smaller one."""
    large = max(2.0, float(round(min(wanted, most))))
    return [max(1.0, float(round(large / SMALL))), large]
