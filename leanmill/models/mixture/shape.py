"""What `model.moe` comes to: numbers and widths of experts, layer by layer, and how many weights that makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.models.mixture.config import MixtureConfig


_NUM_MATRICES = 3
"""Of a gated MLP: gate, up and down."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A mixture of experts in numbers. Widths are of the hidden layer of an expert or MLP."""

    hidden_size: int
    num_layers: int
    layers: tuple[int, ...]
    """Indices of the layers with experts."""
    num_routed: tuple[int, ...]
    """Experts to choose from, in each of `layers`."""
    top_k: int
    """Experts chosen for a token."""
    num_shared: int
    """Experts that every token uses."""
    expert_size: int
    """Width of one expert, routed or shared."""
    dense_size: int | None
    """Width of a dense MLP; None where none is built."""
    num_dense_layers: int
    every_num_layers: int
    has_residual: bool

    @property
    def is_pyramid(self) -> bool:
        """Whether layers have different numbers of experts."""
        return len(set(self.num_routed)) > 1

    @property
    def active_weights(self) -> int:
        """Of experts, those that a token uses in a layer: 3 x hidden x width x used, and the residual one's."""
        used = self.expert_size * (self.top_k + self.num_shared)
        return _NUM_MATRICES * self.hidden_size * (used + self._residual_size)

    @property
    def expert_weights(self) -> tuple[int, ...]:
        """Weights of all experts of each of `layers`, the residual one's included; routers are not counted."""
        shared = self.expert_size * self.num_shared + self._residual_size
        return tuple(_NUM_MATRICES * self.hidden_size * (self.expert_size * n + shared) for n in self.num_routed)

    @property
    def _residual_size(self) -> int:
        return (self.dense_size or 0) if self.has_residual else 0


def shape_of(moe: MixtureConfig, config: Mapping[str, Any]) -> Shape:
    """Return what `model.moe` comes to beside `model.config`.

    Raises:
        ConfigError: The numbers do not fit each other.
    """
    hidden, num_layers = (_needed(config, key) for key in ("hidden_size", "num_hidden_layers"))
    layers = _layers(moe, num_layers)
    has_dense = len(layers) < num_layers or moe.residual_expert
    dense = _needed(config, "intermediate_size") if has_dense or moe.expert_size is None else None
    counts = _spread(moe.num_experts, layers)
    isolated = moe.num_shared_experts if moe.shared == "isolated" else 0
    top_k = moe.granularity * moe.top_k - isolated
    if top_k < 1:
        whole = moe.granularity * moe.top_k
        raise ConfigError(
            f"model.moe.num_shared_experts={isolated} leaves nothing to choose of granularity x top_k = {whole}; set "
            f"num_shared_experts={whole - 1} or less, a larger granularity, or shared=added"
        )
    if moe.top_k > min(counts):
        raise ConfigError(
            f"model.moe.top_k={moe.top_k} is more than num_experts={min(counts)}; set top_k={min(counts)} or less"
        )
    return Shape(
        hidden_size=hidden,
        num_layers=num_layers,
        layers=layers,
        num_routed=tuple(moe.granularity * count - isolated for count in counts),
        top_k=top_k,
        num_shared=moe.num_shared_experts,
        expert_size=_split(moe, moe.expert_size or dense or 0),
        dense_size=dense if has_dense else None,
        num_dense_layers=moe.num_dense_layers,
        every_num_layers=moe.every_num_layers,
        has_residual=moe.residual_expert,
    )


def _needed(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        given = "is missing" if value is None else "is no size"
        raise ConfigError(f"model.config.{key} {given}, and model.moe builds on it; give a whole number above 0")
    return value


def _layers(moe: MixtureConfig, num_layers: int) -> tuple[int, ...]:
    """Layers with experts, as transformers' families place them."""
    every = moe.every_num_layers
    layers = tuple(index for index in range(moe.num_dense_layers, num_layers) if (index + 1) % every == 0)
    if not layers:
        raise ConfigError(
            f"model.moe.num_dense_layers={moe.num_dense_layers} and every_num_layers={every} leave none of "
            f"{num_layers} layers for experts; give smaller ones"
        )
    return layers


def _spread(num_experts: int | list[int], layers: tuple[int, ...]) -> list[int]:
    """Numbers of experts, one a layer of `layers`."""
    if isinstance(num_experts, int):
        return [num_experts] * len(layers)
    each, rest = divmod(len(layers), len(num_experts))
    if rest or not each:
        fitting = [str(n) for n in range(1, len(layers) + 1) if len(layers) % n == 0]
        raise ConfigError(
            f"model.moe.num_experts lists {len(num_experts)} numbers for {len(layers)} layers with experts, each for "
            f"equally many; list {' or '.join(fitting)}"
        )
    return [count for count in num_experts for _ in range(each)]


def _split(moe: MixtureConfig, size: int) -> int:
    """Width of an expert that granularity leaves."""
    if size % moe.granularity:
        below = size // moe.granularity * moe.granularity
        fitting = " or ".join(str(value) for value in (below, below + moe.granularity) if value)
        key = "model.config.intermediate_size" if moe.expert_size is None else "model.moe.expert_size"
        raise ConfigError(
            f"model.moe.granularity={moe.granularity} does not divide {key}={size}; set model.moe.expert_size={fitting}"
        )
    return size // moe.granularity
