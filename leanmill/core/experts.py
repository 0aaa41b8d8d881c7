"""Stacked expert weights as sites, computed through transformers' experts interface.

Transformers keeps the experts of a layer in one module with 3-D parameters `gate_up_proj`
[E, 2I, H] and `down_proj` [E, H, I], and lets a model's config name the function that computes
them. We register one such function: it sorts token copies by expert and runs each weight as one
grouped matmul whose staged weight is recomputed in backward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import ConfigError
from leanmill.core.site import ExpertSite, recomputed


IMPLEMENTATION = "leanmill"
_WEIGHTS = ("gate_up_proj", "down_proj")


def is_stacked_experts(module: nn.Module) -> bool:
    """Whether `module` holds its experts as the 3-D parameters that transformers 5 uses."""
    parameters = [module._parameters.get(name) for name in _WEIGHTS]
    return all(p is not None and p.dim() == 3 for p in parameters) and hasattr(module, "num_experts")


def stacked_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the 3-D weights of a stacked experts module."""
    return tuple(name for name in _WEIGHTS if name in module._parameters)


def attach_expert_site(module: nn.Module, parameter_name: str, name: str) -> ExpertSite:
    """Return the site of one stacked weight, hanging it below `module` the first time.

    Raises:
        ConfigError: The module's weights are transposed, interleaved or biased, which our grouped
            compute does not cover.
    """
    unsupported = {
        "transposed weights": getattr(module, "is_transposed", False),
        "interleaved gate and up rows": not getattr(module, "is_concatenated", True),
        "expert biases": getattr(module, "has_bias", False),
        "a norm after each expert": getattr(module, "has_post_expert_norm", False),
        "no gate": not getattr(module, "has_gate", True),
    }
    found = [what for what, present in unsupported.items() if present]
    if found:
        raise ConfigError(f"{name}: experts with {', '.join(found)} cannot carry stages; add {name!r} to `exclude`")
    if "sites" not in module._modules:
        module.add_module("sites", nn.ModuleDict())
        _use_our_compute(module)
    sites = module._modules["sites"]
    assert isinstance(sites, nn.ModuleDict)
    if parameter_name not in sites:
        sites[parameter_name] = ExpertSite(module, parameter_name, name)
    return sites[parameter_name]  # type: ignore[return-value]


def _use_our_compute(module: nn.Module) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    config = getattr(module, "config", None)
    if config is None:
        raise ConfigError(
            f"{type(module).__name__} does not choose its compute through transformers' experts interface"
        )
    config._experts_implementation = IMPLEMENTATION


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute every routed expert, without dropping tokens.

    Args:
        self: The experts module.
        hidden_states: Tokens [T, H].
        top_k_index: Chosen experts [T, K] int64.
        top_k_weights: Their combine weights [T, K].

    Returns:
        [T, H] in the dtype of `hidden_states`.
    """
    num_tokens, top_k = top_k_index.shape
    expert_of_copy = top_k_index.reshape(-1)
    order = torch.argsort(expert_of_copy, stable=True)
    num_experts: int = self.num_experts  # type: ignore[assignment]
    offsets = torch.bincount(expert_of_copy, minlength=num_experts).cumsum(0).to(torch.int32)
    rows = hidden_states[order // top_k]
    hidden = self._apply_gate(_site_matmul(self, "gate_up_proj", rows, offsets))  # type: ignore[operator]
    out = _site_matmul(self, "down_proj", hidden, offsets)
    out = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    in_place = torch.empty_like(order)
    in_place[order] = torch.arange(order.numel(), device=order.device)
    # Gather then sum: deterministic, and the sum accumulates in fp32, unlike index_add_ in bf16.
    return out[in_place].view(num_tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)


def _site_matmul(module: nn.Module, parameter_name: str, rows: Tensor, offsets: Tensor) -> Tensor:
    sites = module._modules.get("sites")
    site = sites[parameter_name] if isinstance(sites, nn.ModuleDict) and parameter_name in sites else None
    if site is None or not site.stages:
        return grouped_linear(rows, getattr(module, parameter_name), offsets)
    return recomputed(lambda x: grouped_linear(x, site(), offsets), rows)


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply rows sorted by expert with their expert's weight.

    Args:
        rows: [N, in], sorted by expert.
        weight: [E, out, in].
        offsets: End row of each expert [E] int32; experts may have no rows.
    """
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(dtype), weight.to(dtype)
    else:
        rows = rows.to(weight.dtype)
    if _has_grouped_mm(rows, weight):
        return F.grouped_mm(rows.contiguous(), weight.transpose(-2, -1), offs=offsets)
    ends = offsets.tolist()
    pieces = [
        F.linear(rows[start:end], weight[e]) for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
    ]
    return torch.cat(pieces)


def _has_grouped_mm(rows: Tensor, weight: Tensor) -> bool:
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    if rows.device.type == "cuda":
        return weight.dtype == torch.bfloat16 and aligned
    return weight.dtype in (torch.float32, torch.bfloat16) and aligned
