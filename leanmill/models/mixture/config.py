"""The section `model.moe`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from leanmill.core.config import Config


_Count = Annotated[int, Field(ge=1)]


class MixtureConfig(Config):
    """Experts of a new model: coarse ones, as wide as a dense MLP, and how they are split, shared and placed."""

    num_experts: _Count | Annotated[list[_Count], Field(min_length=1)]
    """Experts of a layer at granularity 1. A list gives later layers other numbers (the pyramid of PR-MoE, Rajbhandari
    et al. 2022, arXiv:2201.05596): it is spread over the layers with experts, each number for equally many."""
    top_k: int = Field(default=2, ge=1)
    """Experts that a token uses at granularity 1."""
    granularity: int = Field(default=1, ge=1)
    """m: experts are m times narrower, m times as many, and a token uses m times as many (DeepSeekMoE, Dai et al. 2024,
    arXiv:2401.06066). All weights of experts and those a token uses stay as many."""
    expert_size: int | None = Field(default=None, ge=1)
    """Width of an expert at granularity 1; None is `model.config.intermediate_size`, the width of a dense MLP."""
    num_shared_experts: int = Field(default=0, ge=0)
    """Experts that every token uses, of the width that granularity leaves."""
    shared: Literal["isolated", "added"] = "isolated"
    """`isolated` takes the shared experts out of those there are: s fewer to choose from, s fewer chosen, equally many
    weights (DeepSeekMoE). `added` puts them beside all others, and a token uses more weights."""
    num_dense_layers: int = Field(default=0, ge=0)
    """First layers that keep a dense MLP."""
    every_num_layers: int = Field(default=1, ge=1)
    """Experts stand in every n-th layer, the n-th first; the others keep a dense MLP."""
    residual_expert: bool = False
    """Every token also uses a dense MLP beside the experts, as wide as `model.config.intermediate_size`, and a softmax
    over two numbers mixes both (the residual expert of PR-MoE)."""
