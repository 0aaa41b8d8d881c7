"""Figures of the fused losses on a GPU: three (four with a teacher) matmuls bound them, and Liger is their peer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kernel_case import GpuCase
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.linear_cross_entropy import liger
from leanmill.kernels.linear_cross_entropy.naive import Form
from leanmill.kernels.linear_cross_entropy.op import linear_cross_entropy
from leanmill.kernels.linear_kl.op import TeacherHead, linear_kl


SHAPES = ((8192, 32_000, 4096), (8192, 131_072, 4096))
"""Tokens, vocabulary, hidden size."""


def cases(device: torch.device, shapes: tuple[tuple[int, int, int], ...] = SHAPES) -> list[GpuCase]:
    """The cases for heads of `shapes` on `device`, in bf16."""
    return [case for shape in shapes for case in (*_cross_entropy(device, shape), _divergence(device, shape))]


def _operands(device: torch.device, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, vocab_size, size = shape
    hidden = torch.randn(num_tokens, size, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(vocab_size, size, device=device) / size**0.5).bfloat16().requires_grad_()
    return hidden, weight, torch.randint(vocab_size, (num_tokens,), device=device)


def _cross_entropy(device: torch.device, shape: tuple[int, int, int]) -> list[GpuCase]:
    hidden, weight, labels = _operands(device, shape)
    num_tokens, vocab_size, size = shape
    # A chunk size of its own keeps the operator from handing the call to Liger.
    chunk = min(num_tokens, max(1024, 2**28 // vocab_size // 64 * 64))

    def ours() -> None:
        _run(linear_cross_entropy(hidden, weight, labels, reduction="sum", chunk_tokens=chunk), hidden, weight)

    def from_logits() -> None:
        _run(F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum"), hidden, weight)

    def ligers() -> None:
        _run(liger.summed(hidden, weight, None, labels, -100), hidden, weight)

    peers: list[tuple[str, Callable[[], object]]] = [("logits in fp32", from_logits)]
    if liger.covers(device.type, hidden.dtype, Form(), None, is_tracing=False):
        peers.append(("Liger, fp32 weight gradient", ligers))
    flops = 6 * num_tokens * vocab_size * size
    return [
        GpuCase(
            f"linear_cross_entropy forward + backward, {list(shape)} bf16",
            ours,
            num_flops=flops,
            peer=peer,
            peer_name=name,
            most_time_over_peer=1.0,
        )
        for name, peer in peers
    ]


def _divergence(device: torch.device, shape: tuple[int, int, int]) -> GpuCase:
    hidden, weight, _ = _operands(device, shape)
    theirs, their_weight, _ = _operands(device, shape)
    teacher = TeacherHead(theirs.detach(), their_weight.detach())

    def ours() -> None:
        _run(linear_kl(hidden, weight, teacher=teacher, reduction="sum"), hidden, weight)

    def from_logits() -> None:
        with torch.no_grad():
            target = F.linear(teacher.hidden, teacher.weight).float().log_softmax(-1)
        student = F.linear(hidden, weight).float().log_softmax(-1)
        _run(F.kl_div(student, target, reduction="sum", log_target=True), hidden, weight)

    return GpuCase(
        f"linear_kl forward KL, forward + backward, {list(shape)} bf16",
        ours,
        num_flops=8 * shape[0] * shape[1] * shape[2],
        peer=from_logits,
        peer_name="F.kl_div of two log_softmax in fp32",
        most_time_over_peer=1.0,
    )


def _run(loss: Tensor, hidden: Tensor, weight: Tensor) -> None:
    hidden.grad = weight.grad = None
    loss.backward()
