"""Smaller models out of one with nested MLPs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.surgery import StoredBlock, Surgeon


_ROWS = tuple(f"mlp.{part}_proj.{kind}" for part in ("gate", "up") for kind in ("weight", "bias"))
_COLUMNS = "mlp.down_proj.weight"


def mixed_widths(num_layers: int, width: int, budget: float, granularities: Sequence[int]) -> list[int]:
    """Return the widths of layers that keep at most a share of all neurons: two neighbouring ones, the narrower first.

    Args:
        num_layers: Layers.
        width: Neurons of each.
        budget: The share.
        granularities: Divisors of the width that may be mixed.

    Raises:
        ConfigError: Even the narrowest in all layers is more.
    """
    choices = sorted(width // granularity for granularity in granularities)
    allowed = int(budget * num_layers * width)
    if choices[0] * num_layers > allowed:
        raise ConfigError(
            f"mix_n_match: budget={budget} is less than the narrowest granularity in all layers; type at least "
            f"{choices[0] / width:g}"
        )
    narrow = max(choice for choice in choices if choice * num_layers <= allowed)
    wider = [choice for choice in choices if choice > narrow]
    num_wide = (allowed - narrow * num_layers) // (wider[0] - narrow) if wider else 0
    return [narrow] * (num_layers - num_wide) + [*wider[:1]] * num_wide


class Cut(Surgeon):
    """The first neurons of every MLP; see `MixNMatch` for the arguments."""

    def __init__(
        self,
        *,
        granularity: int | None,
        widths: Sequence[int] | None,
        budget: float | None,
        granularities: Sequence[int],
        padded: bool,
    ) -> None:
        self.granularity, self.asked, self.budget, self.granularities = granularity, widths, budget, granularities
        self.padded = padded
        self.widths: list[int] = []
        self.full, self.written = 0, 0

    def config(self, before: Any) -> Any:
        self.full = getattr(before, "intermediate_size", None) or 0
        if not isinstance(self.full, int) or not self.full or getattr(before, "num_experts", None):
            raise ConfigError(
                f"mix_n_match: {before.model_type!r} has no dense MLP of one width; give a model such as llama or qwen3"
            )
        self.widths = self._widths(before.num_hidden_layers)
        self.written = max(self.widths)
        if len(set(self.widths)) > 1 and not self.padded:
            mean = round(sum(self.widths) / len(self.widths))
            raise ConfigError(
                f"mix_n_match: {before.model_type} has one width for all layers, and {self.widths} are several; give "
                f"each layer the same, the nearest is {mean}, or type padded: true for zeros behind the narrower ones"
            )
        after = copy.deepcopy(before)
        after.intermediate_size = self.written
        return after

    def _widths(self, num_layers: int) -> list[int]:
        if self.asked is not None:
            if len(self.asked) != num_layers or max(self.asked) > self.full:
                raise ConfigError(
                    f"mix_n_match: widths={list(self.asked)} for {num_layers} layers of {self.full} neurons; give "
                    f"{num_layers} numbers of at most {self.full}"
                )
            return list(self.asked)
        asked = self.granularities if self.granularity is None else [self.granularity]
        bad = [granularity for granularity in asked if self.full % granularity]
        if bad:
            raise ConfigError(f"mix_n_match: granularity {bad[0]} does not divide {self.full} neurons; type a divisor")
        if self.granularity is not None:
            return [self.full // self.granularity] * num_layers
        assert self.budget is not None
        return mixed_widths(num_layers, self.full, self.budget, self.granularities)

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        if _COLUMNS not in block.names:
            raise RunError(
                f"layer {block.index} has no {_COLUMNS}; mix_n_match covers families such as llama and qwen3"
            )
        width = self.widths[block.index]
        for name in sorted(block.names):
            tensor = block.read(name)
            if name in _ROWS:
                tensor = _cut(tensor, width, self.written)
            elif name == _COLUMNS:
                tensor = _cut(tensor.t(), width, self.written).t().contiguous()
            yield name, tensor

    def describe(self) -> str:
        share = sum(self.widths) / (self.full * len(self.widths))
        padded = f", written as {self.written} with zeros behind" if len(set(self.widths)) > 1 else ""
        return f"MLPs of {self.full} neurons cut to {', '.join(map(str, self.widths))}, {share:.1%} of them{padded}"


def _cut(tensor: Tensor, width: int, written: int) -> Tensor:
    """The first rows of a tensor, and zeros up to `written` rows."""
    found = torch.zeros(written, *tensor.shape[1:], dtype=tensor.dtype)
    found[:width] = tensor[:width]
    return found
