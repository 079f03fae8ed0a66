"""A clock that gives every moment of a thread to exactly one part of the work, the one entered last."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rlhf_drive.policies import Policy, SceneContext
from rlhf_drive.policies.transformer import TrajectoryDecoder

__all__ = ["REST", "Clock", "watch_network"]

REST = "rest"
"""Stage and part of what nobody claims."""


class Clock:
    """Processor time of the calling thread by stage and part."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._stage, self._parts = REST, [REST]
        self._since = time.thread_time()

    def _charge(self) -> None:
        """What has passed since the last change belongs to the present stage and part."""
        now = time.thread_time()
        self._seconds[self._stage, self._parts[-1]] += now - self._since
        self._since = now

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Within the block, time is the part's, except inside blocks of other parts."""
        self._charge()
        self._parts.append(part)
        try:
            yield
        finally:
            self._charge()
            self._parts.pop()

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Within the block, time is the stage's."""
        self._charge()
        before, self._stage = self._stage, stage
        try:
            yield
        finally:
            self._charge()
            self._stage = before

    def turn_at(self, tensor: Tensor | None, part: str) -> None:
        """Where the backward pass has found the gradient of the tensor, turn from the present part to this one: what
        the tensor was made from comes next."""

        def turn(gradient: Tensor) -> None:
            del gradient
            self._charge()
            self._parts[-1] = part

        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(turn)

    def take(self) -> dict[tuple[str, str], float]:
        """Seconds by stage and part since the last time."""
        self._charge()
        found, self._seconds = dict(self._seconds), defaultdict(float)
        return found

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time charged to the part."""

        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            with self.on(part):
                return function(*args, **options)

        return call

    def staged(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time charged to the stage."""

        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            with self.during(stage):
                return function(*args, **options)

        return call


@contextmanager
def watch_network(clock: Clock) -> Iterator[None]:
    """Charge what any policy computes, forward and backward: `encoder`, `decoder`, `head` and `… backward`.

    The backward pass goes the forward one's way back, so where the gradient of a part's result is there, the backward
    pass of that part begins: the head's, then the decoder's, then the encoder's.
    """
    encode, decode, read = Policy.encode, Policy.action_features, Policy.logits

    def encoded(policy: Policy, observations: Any) -> SceneContext:
        with clock.on("encoder"):
            context = encode(policy, observations)
        for tensor in (*context.keys, *context.values, context.summary):
            clock.turn_at(tensor, "encoder backward")
        return context

    def decoded(policy: Policy, *args: Any, **options: Any) -> Tensor:
        with clock.on("decoder"):
            features = decode(policy, *args, **options)
        clock.turn_at(features, "decoder backward")
        return features

    def headed(policy: Policy, features: Tensor) -> Tensor:
        with clock.on("head"):
            logits = read(policy, features)
        if torch._C._current_graph_task_id() < 0:  # else they are made again, for the values alone
            clock.turn_at(logits, "head backward")
        return logits

    with ExitStack() as stack:
        for owner, name, function in (
            (Policy, "encode", encoded),
            (Policy, "action_features", decoded),
            (Policy, "logits", headed),
            (TrajectoryDecoder, "next", clock.timed("decoder", TrajectoryDecoder.next)),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        yield
