"""What may stand in the place of a layer's attention or MLP, and how it begins."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.core.llama_like import own_config
from leanmill.sparse.structured.anatomy import Sizes
from leanmill.sparse.structured.cut import highest


PartName = Literal["attention", "mlp"]
PREFIXES: dict[PartName, tuple[str, ...]] = {
    "attention": ("self_attn.", "attention_linear.", "input_layernorm."),
    "mlp": ("mlp.", "mlp_linear.", "post_attention_layernorm."),
}
"""What the names of a half's tensors begin with, its norm's included."""


@dataclass(frozen=True)
class Half:
    """An attention or an MLP that a layer may have."""

    size: int
    """Key-value heads or neurons; 0 is none."""
    is_linear: bool = False
    """Whether one matrix is in its place."""

    @property
    def name(self) -> str:
        """As in a recipe and a table of latencies."""
        return str(self.size) if self.size else "linear" if self.is_linear else "none"


@dataclass(frozen=True)
class Pair:
    """What a layer has."""

    attention: Half
    mlp: Half

    @property
    def halves(self) -> tuple[tuple[PartName, Half], ...]:
        """Both, by what they are."""
        return (("attention", self.attention), ("mlp", self.mlp))

    @property
    def is_nothing(self) -> bool:
        """Whether hidden states pass through as they are."""
        return not any(half.size or half.is_linear for half in (self.attention, self.mlp))


class Family:
    """The layers of one model and what they may become.

    Args:
        before: transformers configuration of the model there is, whose layers are alike.
        sizes: Of it.
    """

    def __init__(self, before: Any, sizes: Sizes) -> None:
        self.before, self.sizes = before, sizes
        self._prototypes: dict[tuple[Pair, str], nn.Module] = {}

    @property
    def whole(self) -> Pair:
        """A layer as it is."""
        return Pair(Half(self.sizes.groups), Half(self.sizes.neurons))

    def with_half(self, part: PartName, half: Half) -> Pair:
        """Return a layer of which one half is another."""
        return Pair(half, self.whole.mlp) if part == "attention" else Pair(self.whole.attention, half)

    def config(self, pairs: Sequence[Pair]) -> Any:
        """Return the transformers configuration of a model whose layers are these.

        Raises:
            ConfigError: There is none, since no layer has attention.
        """
        attentions, mlps = [pair.attention for pair in pairs], [pair.mlp for pair in pairs]
        return own_config(
            "puzzle",
            "pruned_llama",
            self.before,
            head_dim=self.sizes.head_dim,
            num_hidden_layers=len(pairs),
            num_attention_heads_by_layer=[self.sizes.heads if half.size else 0 for half in attentions],
            num_key_value_heads_by_layer=[half.size for half in attentions],
            intermediate_size_by_layer=[half.size for half in mlps],
            linear_attention_by_layer=_flags(attentions),
            linear_mlp_by_layer=_flags(mlps),
        )

    def layer(self, pair: Pair, attention_function: str = "sdpa") -> nn.Module:
        """Return a layer of the new family on the meta device; one of nothing passes on what it gets."""
        if pair.is_nothing:
            return Passing()
        key = (pair, attention_function)
        if key not in self._prototypes:
            self._prototypes[key] = self._built(*key)
        prototype = self._prototypes[key]
        shared = [module.config for module in prototype.modules() if hasattr(module, "config")]
        return copy.deepcopy(prototype, {id(config): config for config in shared})

    def _built(self, pair: Pair, attention_function: str) -> nn.Module:
        from transformers import AutoModelForCausalLM

        config = self.config([pair, self.whole])  # the second, since a model must have attention somewhere
        config.vocab_size, config.pad_token_id = 8, None  # nothing is looked up
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention_function)
        layer: nn.Module = model.model.layers[0]
        return layer.eval()

    def attentions(self, asked: Sequence[int | str] | None) -> list[Half]:
        """Return the attentions to choose from, the one there is first."""
        there = self.sizes.groups
        if asked is None:
            halves = [there // 2**n for n in range(1, there.bit_length()) if there % 2**n == 0]
            asked = [*halves, "linear", "none"]
        for number in asked:
            if isinstance(number, int) and there % number:
                fitting = ", ".join(str(n) for n in range(1, there + 1) if there % n == 0)
                raise ConfigError(
                    f"puzzle: key_value_heads={number} of {there}: heads that become one are neighbours, so their "
                    f"number must divide; type some of {fitting}"
                )
        return _distinct([there, *asked])

    def mlps(self, asked: Sequence[float | str], multiple_of: int) -> list[Half]:
        """Return the MLPs to choose from, the one there is first."""
        there, found = self.sizes.neurons, []
        for number in asked:
            if isinstance(number, int) and number > there:
                raise ConfigError(f"puzzle: neurons={number}, and the model has {there}; type at most {there}")
            if isinstance(number, float):
                number = min(there, max(1, round(number * there / multiple_of)) * multiple_of)
            found.append(number)
        return _distinct([there, *found])


class Passing(nn.Module):
    """A layer that does nothing."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return hidden states as they came in."""
        return hidden


def _distinct(numbers: Sequence[int | str]) -> list[Half]:
    halves = [Half(number) if isinstance(number, int) else Half(0, number == "linear") for number in numbers]
    return list(dict.fromkeys(halves))


def _flags(halves: Sequence[Half]) -> list[bool] | None:
    flags = [half.is_linear for half in halves]
    return flags if any(flags) else None


def belongs(name: str, part: PartName) -> bool:
    """Whether a tensor of a layer, by its name relative to it, is of a half or of its norm."""
    return name.startswith(PREFIXES[part])


def begin(
    half: Half, part: PartName, whole: Mapping[str, Tensor], sizes: Sizes, contributions: Tensor
) -> dict[str, Tensor]:
    """Return the tensors of an alternative as it begins, by name relative to the layer, fp32.

    Fewer key-value heads are means of neighbours (Ainslie et al. 2023, arXiv:2305.13245), fewer neurons those that
    contribute most. A matrix is what value and output projections do to a token that attends to itself alone, or up and
    down projections without a gate.

    Args:
        half: The alternative.
        part: Which half it is of.
        whole: Tensors of the layer, by name relative to it.
        sizes: Of the model.
        contributions: Of neurons [neurons], see `ChannelContributions`.
    """
    # In memory of its own, since it will be trained.
    mine = {name: tensor.float().clone() for name, tensor in whole.items() if belongs(name, part)}
    norm = {name: tensor for name, tensor in mine.items() if "layernorm" in name}
    if half.is_linear:
        return norm | (_matrix_of_attention(mine, sizes) if part == "attention" else _matrix_of_mlp(mine))
    if not half.size:
        return {}
    if part == "attention":
        return {name: _pooled(name, tensor, half.size, sizes.head_dim) for name, tensor in mine.items()}
    kept = highest(contributions, half.size)
    return {name: _narrowed(name, tensor, kept) for name, tensor in mine.items()}


def _pooled(name: str, tensor: Tensor, groups: int, head_dim: int) -> Tensor:
    if not name.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
        return tensor
    return tensor.reshape(groups, -1, head_dim, *tensor.shape[1:]).mean(1).flatten(0, 1)


def _narrowed(name: str, tensor: Tensor, kept: Tensor) -> Tensor:
    kept = kept.to(tensor.device)
    if name.startswith(("mlp.gate_proj.", "mlp.up_proj.")):
        return tensor[kept]
    return tensor[:, kept] if name == "mlp.down_proj.weight" else tensor


def _matrix_of_attention(mine: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    def of_queries(tensor: Tensor) -> Tensor:
        by_group = tensor.view(sizes.groups, sizes.head_dim, -1)
        return by_group.repeat_interleave(sizes.heads // sizes.groups, dim=0).flatten(0, 1)

    return _product(mine, "self_attn.v_proj", "self_attn.o_proj", "attention_linear", of_queries)


def _matrix_of_mlp(mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _product(mine, "mlp.up_proj", "mlp.down_proj", "mlp_linear", lambda tensor: tensor)


def _product(mine: Mapping[str, Tensor], first: str, second: str, name: str, spread: Any) -> dict[str, Tensor]:
    outer = mine[f"{second}.weight"]
    found = {f"{name}.weight": outer @ spread(mine[f"{first}.weight"])}
    if f"{first}.bias" in mine:
        bias = (outer @ spread(mine[f"{first}.bias"][:, None]))[:, 0]
        found[f"{name}.bias"] = bias + mine.get(f"{second}.bias", torch.zeros_like(bias))
    return found
