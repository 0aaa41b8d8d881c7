"""Models whose layers have sizes of their own: what they are, and the configuration that says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.sparse.structured.anatomy import Sizes, sizes_of
from leanmill.sparse.structured.cut import smaller_config


OWN_FAMILY = "pruned_llama"
"""The family of Leanmill's own that has layers of any size; see `leanmill.models.pruned_llama`."""
FOLDED_FAMILY = "folded_llama"
"""That whose neighbouring layers share weights; see `leanmill.models.folded_llama`."""
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Whose blocks are of their kind."""
_COPIED = (
    "vocab_size",
    "hidden_size",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "dtype",
    "residual_rotations",
    "qk_norm",
)


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Sizes of each layer."""

    heads: list[int]
    """Query heads; 0 where a layer has no attention."""
    groups: list[int]
    """Key-value heads."""
    neurons: list[int]
    """Of the MLP; 0 where a layer has none."""

    @property
    def is_even(self) -> bool:
        """Whether all layers are alike and whole."""
        sizes = set(zip(self.heads, self.groups, self.neurons, strict=True))
        return len(sizes) == 1 and all(min(size) > 0 for size in sizes)


def widths_of(technique: str, config: Any) -> tuple[Sizes, Widths]:
    """Return the sizes of a model and of each of its layers.

    Args:
        technique: Who asks.
        config: transformers configuration.

    Raises:
        ConfigError: A family whose layers cannot have sizes of their own, or windows of attention.
    """
    if config.model_type not in (*_FAMILIES, OWN_FAMILY):
        raise ConfigError(
            f"{technique} makes layers of different sizes out of {', '.join(_FAMILIES)}, and {config.model_type!r} is "
            f"none of them; give a model of one of these"
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < config.max_position_embeddings:
        raise ConfigError(
            f"{technique}: this {config.model_type} attends to windows of {window} tokens, which {OWN_FAMILY} has not; "
            f"give a model without sliding_window"
        )
    if config.model_type != OWN_FAMILY:
        sizes = sizes_of(technique, config)
        layers = sizes.layers
        return sizes, Widths(
            heads=[sizes.heads] * layers, groups=[sizes.groups] * layers, neurons=[sizes.neurons] * layers
        )
    sizes = Sizes(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head_dim=config.head_dim,
        neurons=config.intermediate_size,
        layers=config.num_hidden_layers,
    )
    return sizes, Widths(
        heads=list(config.num_attention_heads_by_layer),
        groups=list(config.num_key_value_heads_by_layer),
        neurons=list(config.intermediate_size_by_layer),
    )


def config_with(technique: str, before: Any, widths: Widths, layers: Sequence[int], *, own: bool = False) -> Any:
    """Return the transformers configuration of a model whose layers have these sizes.

    Of the family there is where that can say it, else of `pruned_llama`.

    Args:
        technique: Who asks.
        before: Configuration of the model there is; not changed.
        widths: Of the layers that stay.
        layers: Which of the old ones these are.
        own: Whether it is to be `pruned_llama` in any case.

    Raises:
        ConfigError: transformers refuses these sizes.
    """
    sizes, _ = widths_of(technique, before)
    if widths.is_even and not own and before.model_type != OWN_FAMILY:
        new = Sizes(
            hidden=sizes.hidden,
            heads=widths.heads[0],
            groups=widths.groups[0],
            head_dim=sizes.head_dim,
            neurons=widths.neurons[0],
            layers=len(layers),
        )
        try:
            return smaller_config(technique, before, new, layers)
        except ConfigError:
            pass  # Llama wants its heads to divide its hidden size; the own family does not
    return own_config(
        technique,
        OWN_FAMILY,
        before,
        head_dim=sizes.head_dim,
        num_hidden_layers=len(widths.heads),
        num_attention_heads_by_layer=widths.heads,
        num_key_value_heads_by_layer=widths.groups,
        intermediate_size_by_layer=widths.neurons,
    )


def own_config(technique: str, family: str, before: Any, **settings: Any) -> Any:
    """Return the transformers configuration of a model of a family of Leanmill's own, as `before` but for `settings`.

    Raises:
        ConfigError: The family refuses them.
    """
    from transformers import AutoConfig

    copied = {name: getattr(before, name) for name in _COPIED if hasattr(before, name)}
    if before.model_type == "qwen3":
        copied["qk_norm"] = True
    if before.model_type == "qwen2":
        copied["attention_bias"] = True
    try:
        return AutoConfig.for_model(family, **copied | settings)
    except Exception as error:
        text = str(error.__cause__ or error).splitlines()[-1]
        raise ConfigError(f"{technique}: no {family} has these sizes: {text}; ask for other sizes") from error


def completed(after: Any, hidden: int, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a block, and biases of zeros that its new family has and its old one had not.

    Args:
        after: Configuration of the new model.
        hidden: Channels of its residual stream.
        tensors: Of one block, by name relative to it.
    """
    dtypes = {}
    for name, tensor in tensors:
        dtypes[name] = tensor.dtype
        yield name, tensor
    weight, bias = "self_attn.o_proj.weight", "self_attn.o_proj.bias"
    if (
        after.model_type in (OWN_FAMILY, FOLDED_FAMILY)
        and after.attention_bias
        and weight in dtypes
        and bias not in dtypes
    ):
        yield bias, torch.zeros(hidden, dtype=dtypes[weight])
