"""Gates on blocks, learned while the model rests."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.blocks import decoder_blocks
from leanmill.core.surgery import CalibratedModel
from leanmill.core.taps import hidden_of


_WIDTHS = (0.1, 1e-4)
"""Of the gates' valley, at first and at last: gates end near 0 or 1."""


def gates_of(openings: Tensor, width: float) -> Tensor:
    """Return a^2 / (a^2 + width), from 0 to 1: a smooth count of what is not zero."""
    return openings.square() / (openings.square() + width)


def learned_gates(
    model: CalibratedModel, layers: range, *, open_share: float, penalty: float, num_steps: int, learning_rate: float
) -> Tensor:
    """Learn a gate for each block, and return what opens them [blocks], fp32. A collective.

    A gated block gives x + gate (block(x) - x). Each of the Adam steps sees all rows, and lowers the mean loss of the
    next token plus penalty x (mean gate - open_share)^2, while the gates' valley narrows geometrically.

    Args:
        model: Its whole is loaded, fp32; only gates train.
        layers: Which blocks have gates.
        open_share: Mean of the gates that costs nothing.
        penalty: Of the distance from it, squared.
        num_steps: At least 1.
        learning_rate: Of Adam.
    """
    whole: Any = model.whole()
    openings = torch.ones(len(layers), device=next(whole.parameters()).device, requires_grad=True)
    optimizer = torch.optim.Adam([openings], lr=learning_rate)
    with ExitStack() as stack:
        width = [_WIDTHS[0]]
        for place, layer in enumerate(layers):
            gate = _Gate(openings, place, width)
            block = decoder_blocks(whole)[layer]
            stack.callback(block.register_forward_hook(gate, with_kwargs=True).remove)
        for step in range(num_steps):
            width[0] = _WIDTHS[0] * (_WIDTHS[1] / _WIDTHS[0]) ** (step / max(1, num_steps - 1))
            gradient = _gradient_of_loss(model, whole, openings)
            optimizer.zero_grad()
            (penalty * (gates_of(openings, width[0]).mean() - open_share).square()).backward()
            assert openings.grad is not None
            openings.grad += gradient
            optimizer.step()
    return openings.detach().abs().cpu()


class _Gate:
    """A forward hook that lets through a share of what a block changes."""

    def __init__(self, openings: Tensor, place: int, width: list[float]) -> None:
        self.openings, self.place, self.width = openings, place, width

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        gate = gates_of(self.openings[self.place], self.width[0])
        after = before + gate * (hidden_of(output) - before)
        return (after, *output[1:]) if isinstance(output, tuple) else after


def _gradient_of_loss(model: CalibratedModel, whole: Any, openings: Tensor) -> Tensor:
    """Return the gradient of the mean loss over the tokens of all ranks."""
    total = torch.zeros(len(openings) + 1, dtype=torch.float64, device=openings.device)
    for batch in model.rows:
        rows = {name: values.to(openings.device) for name, values in batch.items()}
        logits = whole(**rows, use_cache=False).logits[:, :-1].float()
        targets = rows["input_ids"][:, 1:].flatten()
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum"), openings)
        total[:-1] += gradient
        total[-1] += targets.numel()
    found = model.total(total)
    return (found[:-1] / found[-1]).to(openings.dtype)
