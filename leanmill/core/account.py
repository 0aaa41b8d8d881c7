"""One loss at one place of the model: noted where it arises, its gradient injected on the way back.

See `leanmill.core.ledger`, which opens accounts and hands them out.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanmill.core.stage import TechniqueModule


Per = Literal["token", "micro_batch"]
"""What a loss is a sum over: tokens with a label (added up over all micro-batches of all ranks and divided
by their number), or nothing (the mean over all micro-batches of all ranks)."""


def is_recompute() -> bool:
    """Whether a forward runs again inside a backward pass, as activation checkpointing makes it."""
    return torch._C._current_graph_task_id() != -1


def add_once(into: Tensor, value: Tensor) -> None:
    """Add `value`, without gradients, to `into` in place, unless a forward is only being recomputed."""
    if torch.compiler.is_compiling():
        _add_once(into, value)
    elif not is_recompute():
        # An operator of one's own takes five times as long to call.
        with torch.no_grad():
            into.add_(value)


@torch.library.custom_op("leanmill::add_once", mutates_args={"into"})
def _add_once(into: Tensor, value: Tensor) -> None:
    """Kept whole by compiled code, which would not ask again in recomputation."""
    if not is_recompute():
        into.add_(value)


@_add_once.register_fake
def _(into: Tensor, value: Tensor) -> None:
    return None


@torch.library.custom_op("leanmill::late_gradient", mutates_args=())
def _late_gradient(carried: Tensor, coefficients: Tensor, scale: Tensor) -> Tensor:
    """Return coefficients x scale as they are now.

    `carried`, a gradient, is there to be waited for: a compiler may compute what does not depend on
    backward in forward, when neither factor is known yet.
    """
    return coefficients * scale


@_late_gradient.register_fake
def _(carried: Tensor, coefficients: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(coefficients)


class _Inject(torch.autograd.Function):
    """Identity on the carrier; `values` get the gradient coefficients x scale, read in backward."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, values: Tensor, coefficients: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(coefficients, scale)
        # No view: an in-place operation on one would lose the hooks that FSDP2 puts on a block's output.
        return carrier.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        coefficients, scale = ctx.saved_tensors
        return gradient, _late_gradient(gradient, coefficients, scale), None, None


class Scales(nn.Module):
    """What a sum's gradient is multiplied with, by `Per`; the engine writes it before each step's backward."""

    token: Tensor
    micro_batch: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("token", torch.zeros(1), persistent=False)
        self.register_buffer("micro_batch", torch.zeros(1), persistent=False)


class Account(TechniqueModule):
    """One loss at one place of the model: its weight, and what it has come to since the last record.

    Made by `Ledger.open`. Keep it in a module of the place, so that compiled blocks find their own one
    where they found their first's and share their code.
    """

    factor: Tensor
    """fp32 (1,): weight of the loss in the objective; step rules may write it."""
    sums: Tensor
    """fp32 (3,): of the values, of the values x factor, and their number."""
    one: Tensor

    def __init__(self, name: str, per: Per, weight: float, scales: Scales) -> None:
        super().__init__()
        self.name, self.per, self.scales = name, per, scales
        self.register_buffer("factor", torch.full((1,), float(weight)), persistent=False)
        self.register_buffer("sums", torch.zeros(3), persistent=False)
        self.register_buffer("one", torch.ones(1), persistent=False)

    def attach(self, carrier: Tensor, loss: Tensor) -> Tensor:
        """Return `carrier`, whose backward adds the gradient of weight x `loss`; note its value.

        Args:
            carrier: Any float tensor of the forward pass that the training loss depends on.
            loss: Scalar: the sum over this micro-batch's tokens with a label, or, `per` micro-batch, its
                mean in whatever sense.

        Returns:
            The carrier's values; go on with this tensor instead of `carrier`. In eval mode it is
            `carrier`, and nothing is noted.
        """
        if not self.training:
            return carrier
        value = loss.float().reshape(1)
        self.note(value.detach())
        return self.inject(carrier, value, self.one)

    def inject(self, carrier: Tensor, values: Tensor, coefficients: Tensor) -> Tensor:
        """Return `carrier`, whose backward adds the gradient of weight x (coefficients . values).

        For losses whose coefficients are known only after forward (`Ledger.after_forward`): they are
        read in backward. Write them through `write_late`. Notes no value.

        Args:
            carrier: See `attach`.
            values: fp32 [N].
            coefficients: fp32 [N], without gradients.
        """
        if not self.training:
            return carrier
        scale = self.scales.token if self.per == "token" else self.scales.micro_batch
        out: Tensor = _Inject.apply(carrier, values, coefficients, scale * self.factor)
        return out

    def note(self, value: Tensor) -> None:
        """Add one value, fp32 (1,), to the record."""
        add_once(self.sums, torch.cat([value, value * self.factor, self.one]))


def write_late(buffer: Tensor, value: Tensor) -> None:
    """Write what a forward already hands to its backward, which autograd would take for a mistake."""
    buffer.data.copy_(value)
