"""Models whose layers have sizes of their own: what they are, and the configuration that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.core.llama_like import LLAMA_LIKE, check_family, own_config
from leanmill.sparse.structured.anatomy import Sizes, sizes_of
from leanmill.sparse.structured.cut import smaller_config


OWN_FAMILY = "pruned_llama"
"""The family of Leanmill's own that has layers of any size; see `leanmill.models.pruned_llama`."""


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
    check_family(technique, config, (*LLAMA_LIKE, OWN_FAMILY), "layers of different sizes")
    if getattr(config, "linear_attention_by_layer", None) or getattr(config, "linear_mlp_by_layer", None):
        raise ConfigError(
            f"{technique}: layers of this {config.model_type} have matrices in the place of attention or MLP, in which "
            f"there are no heads and neurons to cut; cut the model before puzzle does"
        )
    if config.model_type != OWN_FAMILY:
        sizes = sizes_of(technique, config)
        layers = sizes.layers
        return sizes, Widths(
            heads=[sizes.heads] * layers, groups=[sizes.groups] * layers, neurons=[sizes.neurons] * layers
        )
    if config.rank_by_linear:
        raise ConfigError(
            f"{technique} cuts heads and neurons out of whole weights, and some of this model are pairs of factors; "
            f"run it before the pass welore"
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
