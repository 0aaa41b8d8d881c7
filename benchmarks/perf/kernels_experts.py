"""Figures of the expert kernels: a whole expert block against transformers' implementations."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from kernel_case import Case, compiled
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from leanmill.core.experts import IMPLEMENTATION, use_our_compute
from leanmill.kernels.grouped_gemm import naive as grouped
from leanmill.kernels.moe_permute import naive as permute
from leanmill.kernels.moe_permute.op import moe_permute, moe_unpermute, sort_by_expert
from leanmill.kernels.native.processor import multiplies_natively
from leanmill.kernels.swiglu import naive as gate
from leanmill.kernels.swiglu.op import swiglu
from leanmill.kernels.topk_router import naive as router
from leanmill.kernels.topk_router.op import topk_router
from leanmill.kernels.topk_router.settings import Settings as RouterSettings


NUM_TOKENS, HIDDEN, WIDTH, NUM_EXPERTS, TOP_K = 4096, 512, 256, 32, 4
PEERS = ("grouped_mm", "eager")
"""`batched_mm` copies the weights of every routed token, 25.8 GB here, and cannot run."""


def experts_module(implementation: str, dtype: torch.dtype) -> nn.Module:
    """Qwen3-MoE's experts, computed through `implementation`."""
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    module = Qwen3MoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02, generator=generator)
    module = module.to(dtype)
    if implementation == IMPLEMENTATION:
        use_our_compute(module, "experts", remedy="cannot be measured")
    else:
        config._experts_implementation = implementation
    return module


def experts_by_definition() -> Callable[..., Tensor]:
    """The block made of the naive definitions, compiled."""

    def block(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, positions: Tensor, offsets: Tensor) -> Tensor:
        hidden = gate.swiglu(grouped.grouped_gemm(x, gate_up, offsets, gather_index=positions))
        return grouped.grouped_gemm(hidden, down, offsets, scatter_index=positions, scatter_weights=weights)

    return compiled(block)


DEFINITION = "definition"
"""In place of an implementation's name: the block made of the naive definitions, compiled."""


def block_step(implementation: str, dtype: torch.dtype) -> Callable[[], object]:
    """Forward and backward of the block: gradients of tokens, combine weights and both weights."""
    module = experts_module("eager" if implementation == DEFINITION else implementation, dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    probabilities = torch.randn(NUM_TOKENS, NUM_EXPERTS, generator=generator).softmax(-1)
    values, index = probabilities.topk(TOP_K, dim=-1)
    weights = (values / values.sum(-1, keepdim=True)).to(dtype).requires_grad_()
    upstream = torch.randn(NUM_TOKENS, HIDDEN, generator=generator).to(dtype)

    run = functools.partial(module, x, index, weights)
    if implementation == DEFINITION:
        _, positions, counts = sort_by_expert(index, NUM_EXPERTS)
        operands = (x, weights, module.gate_up_proj, module.down_proj, positions, counts.cumsum(0))
        run = functools.partial(experts_by_definition(), *operands)

    def step() -> Tensor:
        module.zero_grad(set_to_none=True)
        x.grad = weights.grad = None
        out = run()
        out.backward(upstream)
        return out

    return step


def fastest(steps: dict[str, Callable[[], object]], num_calls: int) -> tuple[str, Callable[[], object]]:
    """Of several implementations, the one with the least time in `num_calls` calls each."""
    from kernels import seconds_of

    times = {name: min(seconds_of(step) for _ in range(num_calls)) for name, step in steps.items()}
    name = min(times, key=times.__getitem__)
    return name, steps[name]


def block_case(dtype: torch.dtype) -> Case:
    """The expert block in one dtype."""
    # Without 16-bit instructions a call of a peer takes over ten seconds.
    is_slow = not multiplies_natively(dtype)
    name, peer = fastest({peer: block_step(peer, dtype) for peer in PEERS}, 1 if is_slow else 3)
    return Case(
        name=f"expert_block_{str(dtype).removeprefix('torch.')}",
        ours=block_step(IMPLEMENTATION, dtype),
        peer=peer,
        peer_name=f"transformers Qwen3-MoE experts, {name} (fastest of {', '.join(PEERS)})",
        # Products on a matrix unit take less of the time, so that the rest, which is ours, shows more.
        limit=0.65 if dtype == torch.bfloat16 and torch.cpu.get_capabilities().get("amx_bf16") else 0.75,
        conditions=f"forward + backward, {NUM_TOKENS} tokens, hidden {HIDDEN}, {NUM_EXPERTS} experts, top-{TOP_K}, "
        f"width {WIDTH}, parameters and activations {dtype}",
        rounds=3 if is_slow else 15,
        # Emulated, a call takes over ten seconds and its compilation many minutes.
        definition=None if is_slow else block_step(DEFINITION, dtype),
    )


def router_by_torch(logits: Tensor) -> Tensor:
    """Weights, counts, z-loss and mean probabilities as tensor code."""
    scores = logits.float().softmax(-1)
    values, index = scores.topk(TOP_K, dim=-1)
    weights = values / values.sum(-1, keepdim=True)
    counts = torch.bincount(index.reshape(-1), minlength=NUM_EXPERTS)
    z_loss = logits.float().logsumexp(-1).square().mean()
    return weights.square().sum() + z_loss + (scores.mean(0) * counts).sum()


def router_by_kernel(logits: Tensor) -> Tensor:
    """The same through the fused router."""
    routed = topk_router(logits, TOP_K)
    return routed.weights.square().sum() + routed.z_loss + (routed.mean_probability * routed.counts).sum()


def router_by_definition() -> Callable[[Tensor], Tensor]:
    """The same through the naive definition, compiled."""
    define = compiled(router.topk_router)

    def call(logits: Tensor) -> Tensor:
        weights, _, counts, z_loss, mean_probability = define(
            logits, None, None, RouterSettings(TOP_K, False, True, 1.0)
        )
        return weights.square().sum() + z_loss + (mean_probability * counts).sum()

    return call


def forward_backward(function: Callable[[Tensor], Tensor], *shape: int) -> None:
    """One forward and backward of a scalar function of fresh inputs' shape."""
    torch.autograd.grad(function(_input(*shape)), _input(*shape))


@functools.cache
def _input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()


def router_case() -> Case:
    """The router with its side losses."""
    shape = (16_384, NUM_EXPERTS)
    definition = router_by_definition()
    return Case(
        name="topk_router_float32",
        ours=lambda: forward_backward(router_by_kernel, *shape),
        peer=lambda: forward_backward(router_by_torch, *shape),
        peer_name="softmax, topk, logsumexp, bincount of torch",
        limit=1.0,
        conditions=f"forward + backward with counts, z-loss and mean probabilities, logits {shape}, top-{TOP_K}",
        definition=lambda: forward_backward(definition, *shape),
    )


def permute_case() -> Case:
    """Sort, copy to experts, sum back."""
    index = torch.randn(NUM_TOKENS, NUM_EXPERTS, generator=torch.Generator().manual_seed(3)).topk(TOP_K).indices

    def by_kernel(x: Tensor) -> Tensor:
        permuted = moe_permute(x, index, NUM_EXPERTS)
        return moe_unpermute(permuted.rows, permuted.positions).sum()

    def by_torch(x: Tensor) -> Tensor:
        order = index.reshape(-1).argsort(stable=True)
        rows = x[order // TOP_K]
        return torch.zeros_like(x).index_add(0, order // TOP_K, rows).sum()

    def by_definition(x: Tensor) -> Tensor:
        _, positions, _ = permute.sort_by_expert(index, NUM_EXPERTS)
        return permute.combine(permute.spread(x, positions), positions).sum()

    shape, definition = (NUM_TOKENS, HIDDEN), compiled(by_definition)
    return Case(
        name="moe_permute_unpermute_float32",
        ours=lambda: forward_backward(by_kernel, *shape),
        peer=lambda: forward_backward(by_torch, *shape),
        peer_name="argsort, indexing and index_add of torch",
        limit=1.0,
        conditions=f"forward + backward, tokens {shape}, {NUM_EXPERTS} experts, top-{TOP_K}",
        definition=lambda: forward_backward(definition, *shape),
    )


def gate_case() -> Case:
    """The gate of an expert's two halves."""

    def by_torch(gate_up: Tensor) -> Tensor:
        half, up = gate_up.chunk(2, dim=-1)
        return (nn.functional.silu(half) * up).sum()

    shape, definition = (NUM_TOKENS * TOP_K, 2 * WIDTH), compiled(gate.swiglu)
    return Case(
        name="swiglu_float32",
        ours=lambda: forward_backward(lambda gate_up: swiglu(gate_up).sum(), *shape),
        peer=lambda: forward_backward(by_torch, *shape),
        peer_name="chunk, silu, multiply of torch",
        limit=1.0,
        conditions=f"forward + backward, gate and up {shape}",
        definition=lambda: forward_backward(lambda gate_up: definition(gate_up).sum(), *shape),
    )


def cases() -> list[Case]:
    """All figures of this group."""
    return [block_case(torch.float32), block_case(torch.bfloat16), router_case(), permute_case(), gate_case()]
