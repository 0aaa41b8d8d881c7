"""Stacked expert weights as sites, computed through transformers' experts interface.

Transformers keeps the experts of a layer in one module with 3-D parameters `gate_up_proj`
[E, 2I, H] and `down_proj` [E, H, I], and lets a model's config name the function that computes
them. We register one such function: the module's dispatch (`leanmill.core.dispatch`) brings tokens to
where their experts are, token copies are sorted by expert, and each weight runs as one grouped matmul
whose staged weight is recomputed in backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from leanmill.core.dispatch import ATTRIBUTE, Dispatch, dispatch_of, meanwhile_of
from leanmill.core.errors import ConfigError
from leanmill.core.expert_shards import part_here, with_divided_gradient
from leanmill.core.operands import Operands, recomputed
from leanmill.core.product import compute_dtype, grouped
from leanmill.core.site import ExpertSite
from leanmill.kernels.gated_experts.op import gated_experts
from leanmill.kernels.moe_permute.op import sort_by_expert
from leanmill.kernels.swiglu.op import swiglu


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
        ConfigError: Our compute does not cover the module, see `use_our_compute`.
    """
    if "sites" not in module._modules:
        use_our_compute(module, name, remedy=f"cannot carry stages; add {name!r} to `exclude`")
        module.add_module("sites", nn.ModuleDict())
    sites = module._modules["sites"]
    assert isinstance(sites, nn.ModuleDict)
    if parameter_name not in sites:
        sites[parameter_name] = ExpertSite(module, parameter_name, name)
    return sites[parameter_name]  # type: ignore[return-value]


def set_dispatch(module: nn.Module, dispatch: Dispatch, name: str) -> None:
    """Let `dispatch` bring tokens to the experts of `module`, and have them computed by us.

    Args:
        module: Stacked experts.
        dispatch: One object a module.
        name: Dotted name of the module, for messages.

    Raises:
        ConfigError: Our compute does not cover the module.
    """
    use_our_compute(module, name, remedy="cannot be spread over ranks; remove layout.ep and layout.experts")
    setattr(module, ATTRIBUTE, dispatch)


def use_our_compute(module: nn.Module, name: str, *, remedy: str) -> None:
    """Have transformers call `experts_forward` for the stacked experts of this model.

    Args:
        module: Stacked experts.
        name: Of them, for messages.
        remedy: End of the message: what they cannot do, and what to type.

    Raises:
        ConfigError: The module's weights are transposed, interleaved or biased, which our grouped
            compute does not cover, or it does not ask transformers' interface.
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
        raise ConfigError(f"{name}: experts with {', '.join(found)} {remedy}")
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
        top_k_index: Chosen experts [T, K] int64; the number of experts stands for a dropped copy.
        top_k_weights: Their combine weights [T, K].

    Returns:
        [T, H] in the dtype of `hidden_states`.
    """
    routed = hidden_states, top_k_index, top_k_weights
    out = dispatch_of(self)(partial(compute_experts, self), *routed, meanwhile=meanwhile_of(self))
    return out.to(hidden_states.dtype)


def compute_experts(
    module: nn.Module,
    tokens: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    num_experts: int | None = None,
    num_copies: int | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Compute the experts whose weights `module` holds; see `ExpertCompute`."""
    held: int = module.num_experts if num_experts is None else num_experts  # type: ignore[assignment]
    _, positions, counts = sort_by_expert(top_k_index, held)
    offsets = counts.cumsum(0)
    gate_up = _held(module, "gate_up_proj", weights)
    down: Tensor | Operands | None = None
    if _is_swiglu(module) and isinstance(gate_up, Tensor) and tokens.device.type == "cpu":
        down = _held(module, "down_proj", weights)
        if isinstance(down, Tensor):
            dtype = compute_dtype(gate_up)
            matrices = tokens.to(dtype), gate_up.to(dtype), down.to(dtype)
            return gated_experts(*matrices, offsets, positions, top_k_weights, num_rows=num_copies)
    # Tokens are gathered while they are multiplied and summed while results are stored, so the only
    # copies of every token's K rows that exist are the two in the middle.
    rows = _matmul(module, gate_up, tokens, offsets, gather_index=positions, num_rows=num_copies)
    hidden = swiglu(rows) if _is_swiglu(module) else module._apply_gate(rows)  # type: ignore[operator]
    down = _held(module, "down_proj", weights) if down is None else down
    routing: dict[str, Any] = {"scatter_index": positions, "scatter_weights": top_k_weights, "num_rows": num_copies}
    return _matmul(module, down, hidden, offsets, **routing)


def _is_swiglu(module: nn.Module) -> bool:
    """Whether the module's gate is transformers' own with SiLU, which we compute in one pass."""
    from transformers.activations import SiLUActivation
    from transformers.integrations.moe import _default_apply_gate

    gate = getattr(type(module), "_apply_gate", None)
    return gate is _default_apply_gate and isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation)


def _held(module: nn.Module, parameter_name: str, weights: Mapping[str, Tensor] | None) -> Tensor | Operands:
    """The weight that experts are multiplied with, or what it is staged from; one of `weights` as it is."""
    if weights is not None:
        return weights[parameter_name]
    sites = module._modules.get("sites")
    site = sites[parameter_name] if isinstance(sites, nn.ModuleDict) and parameter_name in sites else None
    if site is None or not site.is_staged:
        return with_divided_gradient(part_here(getattr(module, parameter_name)), module)
    assert isinstance(site, ExpertSite)
    site()  # so that hooks of a sharding engine run
    operands = site.operands()
    return with_divided_gradient(operands.tensors[0], module) if operands.is_plain else operands


def _matmul(module: nn.Module, held: Tensor | Operands, rows: Tensor, offsets: Tensor, **routing: Any) -> Tensor:
    if isinstance(held, Tensor):
        return grouped(rows, held, None, offsets, **routing)

    def product(tokens: Tensor, *tensors: Tensor) -> Tensor:
        bound = held.bound(tensors)
        tokens = bound.tokens(tokens)
        # Staged in the parameter's dtype, multiplied in that of the rows (see `linear`).
        weight = with_divided_gradient(bound.weight().to(compute_dtype(tokens)), module)
        return bound.product(grouped(tokens, weight, bound.backward_weight(), offsets, **routing))

    return recomputed(product, rows, *held.tensors)
