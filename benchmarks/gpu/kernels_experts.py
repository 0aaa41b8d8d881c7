"""Expert kernels on a GPU: grouped products against a dense matmul and torch's, the rest against the copy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kernel_case import GpuCase
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.grouped_gemm import library
from leanmill.kernels.grouped_gemm.problem import Needed, Problem
from leanmill.kernels.moe_permute.op import moe_permute, moe_unpermute
from leanmill.kernels.swiglu.op import swiglu
from leanmill.kernels.topk_router.op import topk_router


def cases(device: torch.device) -> list[GpuCase]:
    """All cases: shapes of Qwen3-30B-A3B's experts, or tiny ones off the GPU."""
    is_gpu = device.type == "cuda"
    num_tokens, hidden, width, num_experts, top_k = (8192, 2048, 768, 128, 8) if is_gpu else (16, 32, 16, 4, 2)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    x, logits = normal(num_tokens, hidden), normal(num_tokens, num_experts, dtype=torch.float32)
    routed = topk_router(logits, top_k)
    permuted = moe_permute(x, routed.experts, num_experts)
    weight = normal(num_experts, 2 * width, hidden) * 0.02
    problem = Problem(permuted.rows, weight, permuted.counts.cumsum(0))
    gathered = Problem(x, weight, problem.offsets, gather_index=permuted.positions)
    return [
        *product_cases(problem, gathered),
        *movement_cases(x, permuted.positions, routed.weights, routed.experts, num_experts),
        router_case(logits, top_k),
        gate_case(normal(num_tokens * top_k, 2 * width)),
    ]


def product_cases(problem: Problem, gathered: Problem) -> list[GpuCase]:
    """Forward and both gradients, through torch's kernel where it is the one taken, and through ours."""
    flops = 2 * problem.num_rows * problem.weight[0].numel()
    upstream = problem.rows.new_ones(problem.num_rows, problem.out_features)
    ends = problem.offsets.to(torch.int32)

    def torchs() -> Tensor:
        return F.grouped_mm(problem.rows, problem.weight.transpose(-2, -1), offs=ends)

    found = [
        GpuCase("grouped_gemm_library", lambda: library.forward(problem), num_flops=flops, least_matmul_share=0.8),
    ]
    if problem.rows.device.type != "cuda":
        return found
    from leanmill.kernels.grouped_gemm import kernel

    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: kernel.forward(problem),
        "forward_gather": lambda: kernel.forward(gathered),
        "grad_rows": lambda: kernel.backward(problem, upstream, Needed(rows=True, weight=False)),
        "grad_weight": lambda: kernel.backward(problem, upstream, Needed(rows=False, weight=True)),
    }
    for name, call in calls.items():
        case = GpuCase(
            name=f"grouped_gemm_triton_{name}",
            run=call,
            num_flops=flops,
            least_matmul_share=0.8,
            peer=torchs,
            peer_name="torch grouped_mm, forward",
            most_time_over_peer=1.0,
        )
        found.append(case)
    return found


def movement_cases(x: Tensor, positions: Tensor, weights: Tensor, experts: Tensor, num_experts: int) -> list[GpuCase]:
    """Copies to experts, and weighted sums back."""
    num_bytes = (positions.numel() + x.shape[0]) * x.shape[1] * x.element_size()
    rows = moe_permute(x, experts, num_experts).rows
    return [
        GpuCase(
            name="moe_permute",
            run=lambda: moe_permute(x, experts, num_experts),
            num_bytes=num_bytes,
            least_bandwidth_share=0.85,
        ),
        GpuCase(
            name="moe_unpermute",
            run=lambda: moe_unpermute(rows, positions, weights),
            num_bytes=num_bytes,
            least_bandwidth_share=0.85,
        ),
    ]


def router_case(logits: Tensor, top_k: int) -> GpuCase:
    """The router against torch's operations."""

    def by_torch() -> tuple[Tensor, ...]:
        scores = logits.softmax(-1)
        values, experts = scores.topk(top_k, dim=-1)
        counts = torch.bincount(experts.reshape(-1), minlength=logits.shape[1])
        return values / values.sum(-1, keepdim=True), counts, logits.logsumexp(-1).square().mean(), scores.mean(0)

    return GpuCase(
        name="topk_router",
        run=lambda: topk_router(logits, top_k),
        num_bytes=logits.numel() * logits.element_size(),
        peer=by_torch,
        peer_name="softmax, topk, bincount, logsumexp of torch",
        most_time_over_peer=1.0,
    )


def gate_case(gate_up: Tensor) -> GpuCase:
    """The gate, forward."""
    num_bytes = gate_up.numel() * gate_up.element_size() * 3 // 2
    return GpuCase("swiglu", lambda: swiglu(gate_up), num_bytes=num_bytes, least_bandwidth_share=0.85)
