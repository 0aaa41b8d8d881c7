"""Fake quantisation against torchao's, ternary weights against tensor code, low-rank deltas in bytes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import torch
from kernel_case import Case, MemoryCase, compiled
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.fake_quant import naive
from leanmill.kernels.fake_quant.activations import SMALLEST, quantise_activations
from leanmill.kernels.fake_quant.grid import make_grid
from leanmill.kernels.fake_quant.op import fake_quant, initial_scale
from leanmill.kernels.lowrank_delta.op import lowrank_delta, lowrank_delta_linear
from leanmill.kernels.ternary import naive as ternary_naive
from leanmill.kernels.ternary.op import ternary


SIZE = 4096
GROUP = 128


def cases() -> list[Case | MemoryCase]:
    """The figures of this group."""
    lsq = [lsq_case(torch.float32, None), lsq_case(torch.float32, GROUP), lsq_case(torch.bfloat16, None)]
    return [*lsq, learnable_case(), ternary_case(), activations_case(), merged_bytes_case()]


def weight_and_grad(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight as after initialisation, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=generator) * 0.02
    return weight.to(dtype).requires_grad_(), torch.randn(SIZE, SIZE, generator=generator).to(dtype)


def backward(function: Callable[[], Tensor], grad: Tensor, *leaves: Tensor) -> Callable[[], object]:
    """Forward and backward as one call, gradients not accumulated."""

    def call() -> object:
        return torch.autograd.grad(function(), leaves, grad)

    return call


def definition(weight: Tensor, grad: Tensor, scale: Tensor) -> Callable[[], object]:
    """Forward and gradients of the naive definition in int4, compiled."""
    forward, gradients, grid = compiled(naive.forward), compiled(naive.gradients), make_grid(4, "signed")
    weight, scale = weight.detach(), scale.detach()
    factor = (weight.numel() / scale.numel() * grid.high) ** -0.5

    def call() -> object:
        return forward(weight, scale, None, grid), gradients(grad, weight, scale, None, grid, factor, False)

    return call


def lsq_case(dtype: torch.dtype, group: int | None) -> Case:
    """Learned steps in int4: torchao's range learning is its path with gradients of value and scale."""
    from torchao.quantization.granularity import PerAxis, PerGroup

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

        logging.disable(logging.NOTSET)
    weight, grad = weight_and_grad(dtype)
    granularity = PerAxis(0) if group is None else PerGroup(group)
    config = IntxFakeQuantizeConfig(
        torch.int4, granularity=granularity, is_symmetric=True, is_dynamic=False, range_learning=True
    )
    theirs = IntxFakeQuantizer(config)
    theirs._initialized = True
    with torch.no_grad():
        theirs(weight)
    shape = (SIZE, 1 if group is None else SIZE // group)
    scale = initial_scale(weight, shape, num_bits=4).requires_grad_()
    with torch.no_grad():
        theirs.scale.copy_(scale.view_as(theirs.scale))
    what = "row" if group is None else f"group of {group}"
    return Case(
        name=f"fake_quant LSQ int4 a {what}, {str(dtype).removeprefix('torch.')}",
        ours=backward(lambda: fake_quant(weight, scale, num_bits=4), grad, weight, scale),
        peer=backward(lambda: theirs(weight), grad, weight, theirs.scale),
        peer_name="torchao IntxFakeQuantizer with range_learning",
        limit=0.7,
        conditions=f"{SIZE} x {SIZE}, forward and backward to weight and scale",
        rounds=9,
        definition=definition(weight, grad, scale),
    )


def learnable_case() -> Case:
    """The other path of torchao's that learns scales: `LearnableFakeQuantize` calls this operator."""
    weight, grad = weight_and_grad(torch.float32)
    scale = initial_scale(weight, (SIZE, 1), num_bits=4).requires_grad_()
    flat, zero = scale.detach().view(-1).clone().requires_grad_(), torch.zeros(SIZE, requires_grad=True)
    factor = (SIZE * 7) ** -0.5

    def theirs() -> Tensor:
        return torch._fake_quantize_learnable_per_channel_affine(weight, flat, zero, 0, -8, 7, factor)

    return Case(
        name="fake_quant LSQ int4 a row, float32, against torchao's pt2e path",
        ours=backward(lambda: fake_quant(weight, scale, num_bits=4), grad, weight, scale),
        peer=backward(theirs, grad, weight, flat, zero),
        peer_name="torchao LearnableFakeQuantize (torch's learnable per-channel operator)",
        limit=0.7,
        conditions=f"{SIZE} x {SIZE}, forward and backward to weight and scale",
        rounds=9,
    )


def ternary_case() -> Case:
    """BitNet's weights against its published formula."""
    weight, _ = weight_and_grad(torch.float32)
    weight, define = weight.detach(), compiled(ternary_naive.ternarise)

    def formula() -> Tensor:
        scale = 1.0 / weight.abs().mean().clamp(min=1e-5)
        return (weight * scale).round().clamp(-1, 1) / scale

    return Case(
        name="ternary absmean, float32",
        ours=lambda: ternary(weight),
        peer=formula,
        peer_name="the formula of BitNet b1.58 in torch",
        limit=0.7,
        conditions=f"{SIZE} x {SIZE}, one scale, forward",
        definition=lambda: define(weight, "absmean", (-2, -1)),
    )


def activations_case() -> Case:
    """BitNet's activations against its published formula."""
    tokens = weight_and_grad(torch.float32)[0].detach()

    def formula() -> Tensor:
        scale = 127.0 / tokens.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        return (tokens * scale).round().clamp(-128, 127) / scale

    def rounded(tokens: Tensor) -> Tensor:
        codes, steps = naive.activations(tokens, SMALLEST)
        return (codes * steps).to(tokens.dtype)

    define = compiled(rounded)
    return Case(
        name="quantise_activations, float32",
        ours=lambda: quantise_activations(tokens),
        peer=formula,
        peer_name="the formula of BitNet b1.58 in torch",
        limit=0.7,
        conditions=f"{SIZE} tokens x {SIZE}, forward",
        definition=lambda: define(tokens),
    )


def merged_bytes_case() -> MemoryCase:
    """What L4Q's linear layer keeps for backward, beyond parameters and inputs, against a composition."""
    weight = torch.randn(1024, 1024)
    a, b = torch.randn(8, 1024, requires_grad=True), torch.zeros(1024, 8, requires_grad=True)
    scale = initial_scale(weight, (1024, 1), num_bits=4).requires_grad_()
    x = torch.randn(16, 1024, requires_grad=True)
    own = {tensor.untyped_storage().data_ptr() for tensor in (weight, a, b, scale, x)}

    def kept(run: Callable[[], Tensor]) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            out = run()
        del out
        return sum(sizes.values())

    options = {"scale": scale, "num_bits": 4}
    return MemoryCase(
        name="lowrank_delta_linear, bytes kept for backward",
        ours_bytes=lambda: kept(lambda: lowrank_delta_linear(x, weight, a, b, 0.5, **options)),
        peer_bytes=lambda: kept(lambda: F.linear(x, lowrank_delta(weight, a, b, 0.5, **options))),
        peer_name="lowrank_delta, then a linear",
        limit=0.05,
        conditions="1024 x 1024, rank 8, int4 a row, 16 tokens, beyond parameters and input",
    )
