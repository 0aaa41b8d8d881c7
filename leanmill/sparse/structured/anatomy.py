"""Families whose blocks can be cut smaller, their sizes, and what the dims of tensors are. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from leanmill.core.errors import ConfigError, RunError


Axis = Literal["hidden", "heads", "groups", "neurons"]
"""What a dim counts: channels of the residual stream; query heads, key-value heads (each `head_dim` rows); neurons of
a dense MLP."""
DENSE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Whose experts are left as wide as they are."""
_SCALED_EMBEDDINGS = ("gemma", "gemma2", "gemma3_text")
"""Families that multiply embeddings by the root of the hidden size."""
_LAYOUT: tuple[tuple[str, tuple[Axis | None, ...]], ...] = (
    (r"self_attn\.q_proj\.weight", ("heads", "hidden")),
    (r"self_attn\.q_proj\.bias", ("heads",)),
    (r"self_attn\.[kv]_proj\.weight", ("groups", "hidden")),
    (r"self_attn\.[kv]_proj\.bias", ("groups",)),
    (r"self_attn\.o_proj\.weight", ("hidden", "heads")),
    (r"self_attn\.o_proj\.bias", ("hidden",)),
    (r"self_attn\.[qk]_norm\.weight", (None,)),
    (r"(attention|mlp)_rotation\.weight", ("hidden", "hidden")),
    (r"mlp\.(gate|up)_proj\.weight", ("neurons", "hidden")),
    (r"mlp\.(gate|up)_proj\.bias", ("neurons",)),
    (r"mlp\.down_proj\.weight", ("hidden", "neurons")),
    (r"mlp\.down_proj\.bias", ("hidden",)),
    (r".*experts?(\.\d+)?\.(gate_proj|up_proj|w1|w3)\.weight", (None, "hidden")),
    (r".*experts?(\.\d+)?\.(down_proj|w2)\.weight", ("hidden", None)),
    (r".*\.(gate|shared_expert_gate)\.weight", (None, "hidden")),
    (r"\w+_layernorm\.weight", ("hidden",)),
    (r"(model\.embed_tokens|lm_head)\.weight", (None, "hidden")),
    (r"model\.norm\.weight", ("hidden",)),
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a model of one of the families is made of."""

    hidden: int
    """Channels of the residual stream."""
    heads: int
    """Query heads of a layer."""
    groups: int
    """Key-value heads of a layer."""
    head_dim: int
    neurons: int
    """Of a layer's dense MLP."""
    layers: int


def sizes_of(technique: str, config: Any, *, mixtures: bool = False) -> Sizes:
    """Return the sizes of a model.

    Args:
        technique: Who asks.
        config: transformers configuration.
        mixtures: Whether mixtures of experts will do.

    Raises:
        ConfigError: Another family.
    """
    known = DENSE_FAMILIES + (MIXTURES if mixtures else ())
    if config.model_type not in known:
        raise ConfigError(
            f"{technique} knows where the channels, heads and neurons of {', '.join(known)} are, and "
            f"{config.model_type!r} is none of them; give a model of one of these"
        )
    return Sizes(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        neurons=config.intermediate_size,
        layers=config.num_hidden_layers,
    )


def is_mixture(config: Any) -> bool:
    """Whether the MLPs of a model are experts."""
    return config.model_type in MIXTURES


def check_hidden(technique: str, config: Any) -> None:
    """Refuse to take channels from a family whose embeddings are scaled by their number.

    Raises:
        ConfigError: It is one.
    """
    if config.model_type in _SCALED_EMBEDDINGS:
        raise ConfigError(
            f"{technique}: {config.model_type} multiplies embeddings by the root of hidden_size, so fewer channels "
            f"would scale those that stay; leave hidden_size out, or give a model such as llama or qwen3"
        )


def check_layers(technique: str, config: Any) -> None:
    """Refuse to take layers from a model whose configuration says by their number which are dense.

    Raises:
        ConfigError: It is one.
    """
    if getattr(config, "mlp_only_layers", None) or (getattr(config, "decoder_sparse_step", None) or 1) > 1:
        raise ConfigError(
            f"{technique}: this {config.model_type} says by the number of a layer which are dense (mlp_only_layers, "
            f"decoder_sparse_step), so none can go; give a mixture whose layers are all sparse"
        )


def is_output(name: str, part: Literal["attention", "mlp"]) -> bool:
    """Whether a tensor of a block makes what one of its halves adds to the residual stream: nothing, if it is zero."""
    return name.startswith("self_attn.") == (part == "attention") and _is_of_half(name) and axes_of(name)[0] == "hidden"


def _is_of_half(name: str) -> bool:
    return "." in name.removesuffix(".weight").removesuffix(".bias")


def axes_of(name: str) -> tuple[Axis | None, ...]:
    """Return what each dim of a tensor counts, by its name relative to its block, or in full outside of blocks.

    Raises:
        RunError: No family of the list has such a tensor.
    """
    for pattern, axes in _LAYOUT:
        if re.fullmatch(pattern, name):
            return axes
    raise RunError(f"what the dims of the tensor {name!r} count is not known, so the model cannot be cut smaller")
