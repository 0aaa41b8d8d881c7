"""Figures of the N:M operations on the CPU."""

from __future__ import annotations

import torch
from kernel_case import Case, compiled
from torch import Tensor

from leanmill.kernels.nm_mask import naive
from leanmill.kernels.nm_mask.op import nm_project


SHAPE = (4096, 4096)


def by_topk(weight: Tensor) -> Tensor:
    """2:4 the way it is usually written: top-k of each group, scattered into a mask."""
    groups = weight.view(-1, 4)
    kept = groups.abs().topk(2, dim=-1).indices
    return (groups * torch.zeros_like(groups).scatter_(-1, kept, 1.0)).view_as(weight)


class _SrSteByTopk(torch.autograd.Function):
    """SR-STE the way it is usually written: mask and weight saved, the gradient in tensor code."""

    @staticmethod
    def forward(ctx, weight: Tensor, decay: float) -> Tensor:  # noqa: ANN001
        groups = weight.view(-1, 4)
        mask = torch.zeros_like(groups).scatter_(-1, groups.abs().topk(2, dim=-1).indices, 1.0).view_as(weight)
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        weight, mask = ctx.saved_tensors
        return grad + ctx.decay * (1 - mask) * weight, None


def copy_case(dtype: torch.dtype, transposable: bool = False, limit: float = 3.0) -> Case:
    """`nm_project` against a copy into memory that is there already; ours allocates its output."""
    weight = torch.randn(SHAPE).to(dtype)
    target, define = torch.empty_like(weight), compiled(naive.project)
    name = f"nm_project {'transposable ' if transposable else ''}2:4 {dtype}".replace("torch.", "")
    return Case(
        name,
        lambda: nm_project(weight, transposable=transposable),
        lambda: target.copy_(weight),
        "target.copy_(weight)",
        limit,
        f"{list(SHAPE)} {dtype}; ours includes allocating its output, the copy's target is allocated before",
        definition=lambda: define(weight, 2, 4, transposable),
    )


def topk_case() -> Case:
    """`nm_project` against top-k."""
    weight, define = torch.randn(SHAPE), compiled(naive.project)
    return Case(
        "nm_project 2:4 over top-k",
        lambda: nm_project(weight),
        lambda: by_topk(weight),
        "topk, scatter, multiply",
        0.2,
        f"{list(SHAPE)} float32, forward",
        rounds=7,
        definition=lambda: define(weight, 2, 4, False),
    )


def training_case() -> Case:
    """Forward and backward of SR-STE against tensor code."""
    weight = torch.randn(SHAPE, requires_grad=True)
    grad, decay = torch.randn(SHAPE), torch.tensor([2e-4])
    project, decayed = compiled(naive.project), compiled(naive.decayed_grad)

    def definition() -> None:
        project(weight.detach(), 2, 4, False)
        decayed(grad, weight.detach(), decay, 2, 4, False)

    return Case(
        "nm_project 2:4 SR-STE forward and backward over top-k",
        lambda: torch.autograd.grad(nm_project(weight, decay=decay), weight, grad),
        lambda: torch.autograd.grad(_SrSteByTopk.apply(weight, 2e-4), weight, grad),
        "topk, scatter, multiply; grad + decay * (1 - mask) * weight",
        0.2,
        f"{list(SHAPE)} float32, forward and backward",
        rounds=7,
        definition=definition,
    )


def transposable_case() -> Case:
    """Transposable masks against their definition in tensor code."""
    weight, define = torch.randn(1024, 4096), compiled(naive.project)
    return Case(
        "nm_project transposable 2:4 over tensor code",
        lambda: nm_project(weight, transposable=True),
        lambda: naive.project(weight, 2, 4, transposable=True),
        "all 90 patterns in tensor code",
        0.2,
        "[1024, 4096] float32, forward",
        rounds=5,
        definition=lambda: define(weight, 2, 4, True),
    )


def cases() -> list[Case]:
    """What `kernels.py` runs."""
    copies = [copy_case(torch.float32), copy_case(torch.bfloat16), copy_case(torch.float16)]
    return [*copies, topk_case(), training_case(), transposable_case()]
