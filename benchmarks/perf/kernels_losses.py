"""Losses of linear heads against the same losses from logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from kernel_case import Case, MemoryCase, compiled
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.linear_cross_entropy import naive as definition
from leanmill.kernels.linear_cross_entropy.op import linear_cross_entropy
from leanmill.kernels.linear_kl.op import TeacherHead, linear_kl


LARGE = (4096, 131_072, 256)
"""Tokens, vocabulary, hidden size."""
SMALL = (4096, 8192, 320)
"""The head of a 15M model."""


class CrossEntropy:
    """Both ways to the same loss and gradients; tensors are made at first use and kept until `free`."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self._made: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, weight, labels."""
        if self._made is None:
            num_tokens, vocab_size, size = self.shape
            torch.manual_seed(0)
            hidden, weight = torch.randn(num_tokens, size), torch.randn(vocab_size, size) / size**0.5
            labels = torch.randint(vocab_size, (num_tokens,))
            self._made = (hidden.requires_grad_(), weight.requires_grad_(), labels)
        self._made[0].grad = self._made[1].grad = None
        return self._made

    def ours(self) -> None:
        """Forward and backward without logits."""
        linear_cross_entropy(*self.operands).backward()

    def peer(self) -> None:
        """Forward and backward from logits."""
        hidden, weight, labels = self.operands
        F.cross_entropy(F.linear(hidden, weight).float(), labels).backward()

    def defined(self) -> Callable[[], None]:
        """Forward and backward of the naive definition, compiled."""
        losses, form = compiled(definition.token_losses), definition.Form()

        def call() -> None:
            hidden, weight, labels = self.operands
            losses(hidden, weight, None, labels, form, -100).mean().backward()

        return call

    def raw_peak(self, call: Callable[[], None]) -> int:
        """Bytes that the process held at the peak of a call: inputs, gradients and what comes between."""
        inputs = sum(t.numel() * t.element_size() for t in self.operands)
        return inputs + peak_growth(call)

    def extra_peak(self, call: Callable[[], None]) -> int:
        """The same above the inputs and the gradients, which any way has to hold."""
        gradients = sum(t.numel() * t.element_size() for t in self.operands[:2])
        return peak_growth(call) - gradients


def peak_growth(call: Callable[[], None]) -> int:
    """Return by how many bytes the resident memory of this process rises at most during a call."""
    # 5 resets the high-water mark to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


class Distillation:
    """Forward KL of a student's head against a teacher's."""

    def __init__(self) -> None:
        num_tokens, vocab_size, size = 2048, 8192, 320
        torch.manual_seed(0)
        self.hidden, self.teacher_hidden = (
            torch.randn(num_tokens, size, requires_grad=True),
            torch.randn(num_tokens, size),
        )
        self.weight, self.teacher_weight = (torch.randn(vocab_size, size) / size**0.5 for _ in range(2))
        self.weight.requires_grad_()

    def ours(self) -> None:
        """Forward and backward without logits."""
        teacher = TeacherHead(self.teacher_hidden, self.teacher_weight)
        linear_kl(self.hidden, self.weight, teacher=teacher).backward()

    def peer(self) -> None:
        """Forward and backward from logits with torch's own divergence."""
        with torch.no_grad():
            teacher = F.linear(self.teacher_hidden, self.teacher_weight).log_softmax(-1)
        student = F.linear(self.hidden, self.weight).log_softmax(-1)
        F.kl_div(student, teacher, reduction="batchmean", log_target=True).backward()


def cases() -> list[Case | MemoryCase]:
    """The figures of this group."""
    large, small, distillation = CrossEntropy(LARGE), CrossEntropy(SMALL), Distillation()
    naive = "F.cross_entropy(F.linear(h, W).float(), labels)"
    at_large = "fp32, 4,096 tokens x 131,072 vocabulary, hidden 256, forward + backward"
    return [
        Case(
            "linear_cross_entropy time",
            small.ours,
            small.peer,
            naive,
            1.1,
            "fp32, 4,096 tokens x 8,192 vocabulary, hidden 320, forward + backward",
            definition=small.defined(),
        ),
        Case("linear_cross_entropy time, large vocabulary", large.ours, large.peer, naive, 1.1, at_large, rounds=3),
        MemoryCase(
            "linear_cross_entropy memory",
            lambda: large.extra_peak(large.ours),
            lambda: large.extra_peak(large.peer),
            naive,
            1 / 8,
            f"{at_large}; peak resident memory above inputs and their gradients",
        ),
        MemoryCase(
            "linear_cross_entropy memory, all of it",
            lambda: large.raw_peak(large.ours),
            lambda: large.raw_peak(large.peer),
            naive,
            1 / 8,
            f"{at_large}; peak resident memory with inputs and gradients",
        ),
        Case(
            "linear_kl time",
            distillation.ours,
            distillation.peer,
            "F.kl_div of two log_softmax, log_target",
            1.1,
            "fp32, forward KL, 2,048 tokens x 8,192 vocabulary, hidden 320 both, forward + backward",
        ),
    ]
