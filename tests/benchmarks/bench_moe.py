"""Our sparse-MoE block beside Qwen3-MoE's of transformers: forward and backward, interleaved in one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_moe.py [--rounds 15] [--device cpu] [--cases large,recipe]
        [--dtypes float32,bfloat16] [--clock cpu]

Both blocks get the same tokens, width, experts and top-k. Theirs has three matrices an expert (gated SwiGLU), ours two
(GELU), so ours gets a hidden width 3/2 of theirs: equal multiply-adds. Ours also has a shared expert: the rows say
whether it runs. The rest differs little: one SiLU and a product on ``2 ff`` columns against one GELU on ``1.5 ff``;
ours keeps gates and the sum over experts in float32.

Each round runs every block once, one after the other; the ratio is the median over rounds of a block's time to that of
the fastest of theirs in the same round, so that a busy machine slows both. Times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_drive.policies.dispatch import KERNELS
from rlhf_drive.policies.moe import SparseMoE


@dataclass(frozen=True)
class Case:
    """A size: theirs has `ff` inside an expert, ours ``3/2 ff``."""

    tokens: int
    dim: int
    experts: int
    top_k: int
    ff: int


CASES = {"large": Case(8192, 256, 16, 2, 512), "recipe": Case(4096, 96, 8, 2, 64)}
"""`recipe` is the size of the shipped recipes: 96 inside our experts."""


def theirs(case: Case, implementation: str) -> nn.Module:
    """Qwen3-MoE's block with one of its expert implementations."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=case.dim, num_experts=case.experts, num_experts_per_tok=case.top_k,
        moe_intermediate_size=case.ff, norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = implementation
    block = Qwen3MoeSparseMoeBlock(config)
    for weight in block.parameters():
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return block


def ours(case: Case, kernel: str, *, shared: bool) -> nn.Module:
    """Our block; without the shared expert the input is added in its place."""
    block = SparseMoE(case.dim, case.ff * 3 // 2, case.experts, case.top_k)
    block.kernel = kernel
    if not shared:
        block.shared = nn.Identity()
    return block


def blocks(case: Case) -> dict[str, nn.Module]:
    """All that are compared, by name."""
    found = {f"qwen3 {name}": theirs(case, name) for name in ("eager", "grouped_mm")}
    found |= {f"ours {kernel}": ours(case, kernel, shared=False) for kernel in KERNELS}
    return found | {"ours slices + shared": ours(case, "slices", shared=True)}


def once(block: nn.Module, x: Tensor, gradient: Tensor, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a forward pass, and of both."""
    wait: Callable[[], None] = torch.cuda.synchronize if x.is_cuda else lambda: None
    block.zero_grad()
    x.grad = None
    wait()
    started = clock()
    out = block(x)
    wait()
    forward = clock() - started
    out.backward(gradient)
    wait()
    return forward, clock() - started


def measure(case: Case, dtype: torch.dtype, device: str, rounds: int, clock: Callable[[], float]) -> None:
    """Print a table for one size and dtype."""
    torch.manual_seed(0)
    x = torch.randn(case.tokens // 16, 16, case.dim, dtype=dtype, device=device, requires_grad=True)
    gradient = torch.randn_like(x)
    compared = {name: block.to(device, dtype) for name, block in blocks(case).items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in compared}
    for number in range(rounds + 2):
        for name, block in compared.items():
            spent = once(block, x, gradient, clock)
            if number >= 2:
                times[name].append(spent)
    base = [min(times[name][i][1] for name in times if name.startswith("qwen3")) for i in range(rounds)]
    print(f"\n{case}, {dtype}, {device}, {torch.get_num_threads()} thread(s), {rounds} rounds")
    for name, spent in times.items():
        forward, both = (1e3 * statistics.median(column) for column in zip(*spent, strict=True))
        ratio = statistics.median(pair[1] / b for pair, b in zip(spent, base, strict=True))
        least = 1e3 * min(pair[1] for pair in spent)
        print(f"  {name:22s} forward {forward:8.1f} ms   both {both:8.1f} ms (least {least:8.1f})   ratio {ratio:5.2f}")


def main() -> None:
    """Run the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: where others use the machine too"
    )
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    for case in arguments.cases.split(","):
        for dtype in arguments.dtypes.split(","):
            measure(CASES[case], getattr(torch, dtype), arguments.device, arguments.rounds, clock)


if __name__ == "__main__":
    main()
