"""A policy wrapped for several processes: gradients are added up (DDP), or weights are divided as well (FSDP2).

Likelihoods call a policy's methods and never its `forward`, while DDP and FSDP2 act on `forward`. So what is wrapped is
:class:`Call`, whose forward pass is any function of the policy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from rlhf_drive.policies import Policy
from rlhf_drive.policies.transformer import DecoderLayer, EncoderLayer

__all__ = ["Call", "add_up_gradients", "divide_weights"]


class _Rest:
    """What a function gave besides its loss, hidden from hooks that would take hold of the tensors in it."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Call(nn.Module):
    """``call(function)`` is ``function(policy)``: a loss, or a tuple that begins with one."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, function: Callable[[Policy], Any]) -> tuple[Tensor | None, _Rest]:
        """The loss, where there is one, by itself: gradients flow through it alone."""
        value = function(self.policy)
        loss = value[0] if isinstance(value, tuple) else value
        return (loss if isinstance(loss, Tensor) else None), _Rest(value)

    @staticmethod
    def unpack(loss: Tensor | None, rest: _Rest) -> Any:
        """What the function gave, with the loss as the hooks left it."""
        value = rest.value
        if loss is None:
            return value
        return (loss, *value[1:]) if isinstance(value, tuple) else loss


def add_up_gradients(policy: Policy, accelerator: Accelerator) -> DistributedDataParallel:
    """DDP through `accelerate`: every process holds all weights; all start with those of the first.

    Gradients are summed. DDP by itself would average them, which is right only for losses that are means.
    """
    with warnings.catch_warnings():  # torch has another name for one of accelerate's options
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        wrapped = accelerator.prepare_model(Call(policy))
    assert isinstance(wrapped, DistributedDataParallel)
    wrapped.register_comm_hook(None, lambda state, bucket: _sum(bucket))
    return wrapped


def _sum(bucket: Any) -> torch.futures.Future[Tensor]:
    """Communication hook of DDP: the sum over processes, not divided by their number."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


def divide_weights(policy: Policy, processes: int) -> FSDPModule:
    """FSDP2: every process holds a piece of each weight, gradient and moment; a transformer layer is made whole while
    it works. The policy's own weights become `DTensor`s.

    torch's own interface, since `accelerate` has FSDP2 on accelerators only. Weights are made whole in float32: where
    the policy computes in bfloat16 it casts by itself, as it does in a sampler, so that both see the same numbers.
    """
    for tensor in (*policy.parameters(), *policy.buffers()):
        dist.broadcast(tensor.detach(), src=0)  # as DDP does: all start with the weights of the first
    mesh = init_device_mesh(policy.device.type, (processes,))
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    call = Call(policy)
    for layer in [m for m in policy.modules() if isinstance(m, EncoderLayer | DecoderLayer)]:
        if isinstance(layer, DecoderLayer):  # used by itself, when a scene is encoded
            fully_shard(layer.key_value, mesh=mesh, mp_policy=precision)
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    root = fully_shard(call, mesh=mesh, mp_policy=precision)
    for unit in (m for m in call.modules() if isinstance(m, FSDPModule)):
        unit.set_gradient_divide_factor(1.0)  # sums
        unit.set_force_sum_reduction_for_comms(True)  # as such: gloo knows no scaled sum
    # Layers give views of what they computed, as linear maps do; nothing in the policy writes into them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    return root
