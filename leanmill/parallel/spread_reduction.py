"""Averaging gradients of what a layout spreads over the ranks that hold the same parts, beside DDP's own reduction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from leanmill.parallel.tensors import local


class SpreadReduction:
    """Reduces each gradient as soon as the last micro-batch's backward has it, beside what is left of that backward.

    Args:
        parameters: Experts, or parts of matmuls, as DTensors, replicated over the ranks of `group`.
        group: The ranks with the same parts; None where there are none to reduce.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._is_last = False
        self._begun: list[tuple[Tensor, Any]] = []
        if group is not None and group.size() > 1:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self._reduce)

    def begin(self) -> None:
        """The backward that follows completes the gradients."""
        self._is_last = True

    def finish(self) -> None:
        """Return once all gradients are means."""
        assert self._group is not None or not self._begun
        for gradient, work in self._begun:
            work.wait()
            gradient.div_(self._group.size())  # type: ignore[union-attr]
        self._begun, self._is_last = [], False

    def _reduce(self, parameter: Tensor) -> None:
        if self._is_last and parameter.grad is not None:
            gradient = local(parameter.grad)
            self._begun.append((gradient, dist.all_reduce(gradient, group=self._group, async_op=True)))
