"""Parameters of a model, all and active."""

from __future__ import annotations

from torch import nn

from leanmill.core.branches import plain_modules
from leanmill.core.stage import added_parameters


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (all, trainable) parameters, tied ones once, those of techniques included."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def num_active_parameters(model: nn.Module) -> int:
    """Return the parameters of the plain model that one token passes through.

    Tied weights count once; of stacked experts, top_k of num_experts count; what techniques added
    does not.
    """
    from leanmill.core.experts import is_stacked_experts, stacked_parameters

    added = {id(p) for p in added_parameters(model)}
    total = sum(p.numel() for p in model.parameters() if id(p) not in added)
    top_k = getattr(model.config, "num_experts_per_tok", None)
    idle = 0
    for _, module in plain_modules(model):
        if is_stacked_experts(module) and top_k is not None:
            size = sum(getattr(module, name).numel() for name in stacked_parameters(module))
            num_experts = getattr(module, stacked_parameters(module)[0]).shape[0]
            idle += size - size * min(top_k, num_experts) // num_experts
    return total - idle
