"""Trading compute for memory: which activations of a decoder block are kept for backward.

Built on transformers' own switch, which wraps a block's `forward` inside its hooks, so parameter
names stay as they are and a sharding engine gathers weights outside the recomputed part. The
recompute of staged weights inside sites nests in it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from leanmill.core.errors import ConfigError


_MATMULS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "linear")
_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math",
)
_COLLECTIVES = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
"""What these return is waited for again in recomputation, which then returns at once."""


def apply_activation_checkpointing(
    model: nn.Module, mode: Literal["none", "selective", "full"], *, keeps_received: bool = False
) -> None:
    """Recompute decoder blocks in backward, in training mode only.

    Args:
        model: The Hugging Face causal LM.
        mode: `none` changes nothing; `full` keeps a block's input only; `selective` also keeps
            what its matmuls, its attention and its collectives return and recomputes the rest (norms,
            activations, rotary embeddings), which costs little time.
        keeps_received: `full` too keeps what collectives return, and recomputes the rest: tokens travel to
            experts of other ranks once, and not again in backward (Singh et al., 2023, arXiv:2303.06318,
            section 4.2).

    Raises:
        ConfigError: The family does not support it.
    """
    if mode == "none":
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"{type(model).__name__} does not support activation checkpointing; set train.activation_checkpointing=none"
        )
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = _selective_contexts
    elif keeps_received:
        options["context_fn"] = _received_contexts
    _enable(model, options)
    # The switch also makes embeddings require gradients, for reentrant checkpoints. Ours are not,
    # and a frozen embedding should cost no backward.
    model.disable_input_require_grads()  # type: ignore[operator]
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_gradient_checkpointing_func")]
    for layer in layers:
        layer._gradient_checkpointing_func = _where_gradients_flow(layer._gradient_checkpointing_func)


def _enable(model: Any, options: dict[str, Any]) -> None:
    """Call transformers' switch by the name that the installed version has; it was renamed between 5.17 and 5.23."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _where_gradients_flow(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Recompute only what has a backward: the compiler cannot trace the recomputation of a block without one.

    Blocks below all that trains are such, where embeddings are frozen.
    """

    def call(function: partial[Any], *args: Any) -> Any:
        (block,) = [part for part in function.args if isinstance(part, nn.Module)]
        tensors = [*block.parameters(), *(arg for arg in args if isinstance(arg, Tensor))]
        if any(tensor.requires_grad for tensor in tensors):
            return checkpoint(function, *args)
        return function(*args)

    return call


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_kept_operators())


def _received_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_overloads(torch.ops._c10d_functional, _COLLECTIVES))


@cache
def _kept_operators() -> list[Any]:
    kept = _overloads(torch.ops.aten, (*_MATMULS, *_ATTENTION)) + _overloads(torch.ops._c10d_functional, _COLLECTIVES)
    return [*kept, torch.ops.higher_order.flex_attention]


def _overloads(library: Any, names: tuple[str, ...]) -> list[Any]:
    """Those that exist in this version of torch."""
    packets = [getattr(library, name) for name in names if hasattr(library, name)]
    return [packet.default for packet in packets if "default" in packet.overloads()]
