"""Configuration of the family `pruned_llama`. Imports nothing of Leanmill, so that it can travel with its weights."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig


_OF_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_OF_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@strict
class PrunedLlamaConfig(LlamaConfig):
    """Llama, Mistral, Qwen2 or Qwen3 whose layers differ in heads and neurons, or have no attention or no MLP.

    In the place of either a layer may have one matrix, as in Puzzle (Bercovich et al. 2024, arXiv:2411.19146).

    `num_attention_heads` and `num_key_value_heads` become those of the layer with the most heads, `intermediate_size`
    the largest.
    """

    model_type = "pruned_llama"
    base_model_tp_plan = None  # type: ignore[assignment]  # heads need not divide
    base_model_pp_plan = None  # type: ignore[assignment]

    num_attention_heads_by_layer: list[int] | None = None
    """Query heads of each layer, 0 where it has no attention; None is `num_attention_heads` in each."""
    num_key_value_heads_by_layer: list[int] | None = None
    """Key-value heads of each layer, which divide its query heads."""
    intermediate_size_by_layer: list[int] | None = None
    """Neurons of each layer's MLP, 0 where it has none; None is `intermediate_size` in each."""
    linear_attention_by_layer: list[bool] | None = None
    """Whether a layer without attention has a matrix in its place; None is in no layer."""
    linear_mlp_by_layer: list[bool] | None = None
    """Whether a layer without neurons has a matrix in the place of its MLP; None is in no layer."""
    qk_norm: bool = False
    """Whether queries and keys of a head are normalised, as in Qwen3."""
    rank_by_linear: dict[str, list[int]] | None = None
    """By name of a linear layer, such as `mlp.up_proj`, the rank that its weight has in each layer, kept as two factors
    (Jaiswal et al. 2024, arXiv:2407.11239); 0 where it is whole."""
    residual_rotations: bool = False
    """Whether attention and MLP are added to a residual stream that is multiplied by a matrix first, as in SliceGPT
    (Ashkboos et al. 2024, arXiv:2401.15024)."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        heads = self._of_layers("num_attention_heads")
        groups = self._of_layers("num_key_value_heads")
        if self.num_key_value_heads_by_layer is None and self.num_attention_heads_by_layer is not None:
            groups = list(heads)
        neurons = self._of_layers("intermediate_size")
        self._check_matrices("linear_attention_by_layer", heads)
        self._check_matrices("linear_mlp_by_layer", neurons)
        for layer, (of_queries, of_keys) in enumerate(zip(heads, groups, strict=True)):
            if (of_queries == 0) != (of_keys == 0) or (of_keys and of_queries % of_keys):
                raise ValueError(
                    f"layer {layer} has {of_queries} query heads, which its {of_keys} key-value heads do not divide"
                )
            if not of_queries and not neurons[layer] and not self._has_matrix(layer):
                raise ValueError(f"layer {layer} has neither attention nor neurons; leave the layer out")
        if not any(heads):
            raise ValueError("num_attention_heads_by_layer leaves no layer with attention")
        for name, ranks in (self.rank_by_linear or {}).items():
            if len(ranks) != self.num_hidden_layers or min(ranks) < 0:
                raise ValueError(
                    f"rank_by_linear: {name}={ranks} is to be a rank of at least 0 for {self.num_hidden_layers} layers"
                )
            there = heads if name in _OF_ATTENTION else neurons if name in _OF_MLP else [0] * len(ranks)
            for layer, (rank, size) in enumerate(zip(ranks, there, strict=True)):
                if rank and not size:
                    raise ValueError(f"rank_by_linear: layer {layer} has no linear layer {name}")
        self.num_attention_heads_by_layer, self.num_key_value_heads_by_layer = heads, groups
        self.intermediate_size_by_layer = neurons
        self.num_attention_heads, self.num_key_value_heads = max(zip(heads, groups, strict=True))
        self.intermediate_size = max(neurons) or self.intermediate_size

    def _has_matrix(self, layer: int) -> bool:
        return any(flags[layer] for flags in (self.linear_attention_by_layer, self.linear_mlp_by_layer) if flags)

    def _check_matrices(self, name: str, sizes: list[int]) -> None:
        given: list[bool] | None = getattr(self, name)
        if given is None:
            return
        if len(given) != self.num_hidden_layers:
            raise ValueError(f"{name}={given} is to be true or false for {self.num_hidden_layers} layers")
        for layer, (is_linear, size) in enumerate(zip(given, sizes, strict=True)):
            if is_linear and size:
                raise ValueError(f"{name}: layer {layer} has what a matrix would take the place of; give it size 0")

    def _of_layers(self, name: str) -> list[int]:
        given: list[int] | None = getattr(self, f"{name}_by_layer")
        if given is None:
            return [getattr(self, name)] * self.num_hidden_layers
        if len(given) != self.num_hidden_layers or min(given) < 0:
            raise ValueError(
                f"{name}_by_layer={given} is to be a size of at least 0 for {self.num_hidden_layers} layers"
            )
        return list(given)

    def validate_architecture(self) -> None:
        """Heads of size `head_dim` need not fill the hidden size."""
