"""Surgeons that leave every layer heads and neurons of its own number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from leanmill.core.llama_like import completed
from leanmill.core.surgery import CalibratedModel, LookingSurgeon, StoredBlock
from leanmill.sparse.structured.anatomy import Sizes
from leanmill.sparse.structured.cut import Cutter, Kept
from leanmill.sparse.structured.widths import Widths, config_with, widths_of


_NORM_OF = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
"""What a layer does without where it does without a half."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Indices of what stays of each layer, ascending, int64; none where the layer does without."""

    heads: list[Tensor]
    """Query heads."""
    groups: list[Tensor]
    """Key-value heads."""
    neurons: list[Tensor]

    @property
    def widths(self) -> Widths:
        """How many these are."""
        return Widths(
            heads=[len(index) for index in self.heads],
            groups=[len(index) for index in self.groups],
            neurons=[len(index) for index in self.neurons],
        )


class UnevenSurgeon(LookingSurgeon):
    """Cuts heads and neurons; subclasses say how many, and which."""

    technique: ClassVar[str]

    def __init__(self) -> None:
        self.before: Any = None
        self.after: Any = None
        self.sizes: Sizes
        self.widths: Widths
        """Of the model there is."""
        self.chosen: Chosen

    def expected(self) -> Widths:
        """Return what is foreseen of the new model's layers before calibration rows tell."""
        raise NotImplementedError

    def choose(self, model: CalibratedModel) -> Chosen:
        """Return what stays. A collective."""
        raise NotImplementedError

    def config(self, before: Any) -> Any:
        self.before = before
        self.sizes, self.widths = widths_of(self.technique, before)
        return config_with(self.technique, before, self.expected(), range(self.sizes.layers), own=True)

    def look(self, model: CalibratedModel) -> Any:
        return self.take(self.choose(model))

    def take(self, chosen: Chosen) -> Any:
        """Make the model of what stays the one that is written; return its transformers configuration."""
        self.chosen, widths = chosen, chosen.widths
        layers = [layer for layer in range(self.sizes.layers) if widths.heads[layer] or widths.neurons[layer]]
        self._cutter = Cutter(
            self.sizes,
            Kept(layers=layers, heads=self.chosen.heads, groups=self.chosen.groups, neurons=self.chosen.neurons),
        )
        left = Widths(
            heads=[widths.heads[layer] for layer in layers],
            groups=[widths.groups[layer] for layer in layers],
            neurons=[widths.neurons[layer] for layer in layers],
        )
        self.after = config_with(self.technique, self.before, left, layers)
        return self.after

    def place(self, index: int) -> int | None:
        return self._cutter.place(index)

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        gone = []
        if not len(self.chosen.heads[block.index]):
            gone += ["self_attn", _NORM_OF["self_attn"]]
        if not len(self.chosen.neurons[block.index]):
            gone += ["mlp", _NORM_OF["mlp"]]
        cut = ((name, tensor) for name, tensor in self._cutter.block(block) if name.split(".")[0] not in gone)
        return completed(self.after, self.sizes.hidden, cut)

    def describe(self) -> str:
        before, after = self.widths, self.chosen.widths
        words = (("heads", "query heads"), ("groups", "key-value heads"), ("neurons", "neurons"))
        cut = [
            f"{sum(getattr(before, key))} {word} cut to {sum(getattr(after, key))}"
            for key, word in words
            if getattr(before, key) != getattr(after, key)
        ]
        return f"{'; '.join(cut) or 'nothing cut'} (neurons by layer: {', '.join(map(str, after.neurons))})"


def query_heads_of(groups: Tensor, shared: int) -> Tensor:
    """Return the query heads of key-value heads [n], `shared` each, int64 [n x shared]."""
    return (groups[:, None] * shared + torch.arange(shared)).flatten()


def everything(widths: Widths) -> Chosen:
    """Return all that there is."""
    return Chosen(
        heads=[torch.arange(number) for number in widths.heads],
        groups=[torch.arange(number) for number in widths.groups],
        neurons=[torch.arange(number) for number in widths.neurons],
    )


def evenly(numbers: Sequence[int], share: float, multiple_of: int = 1) -> list[int]:
    """Return sizes of layers of which each keeps a share."""
    return [min(n, max(multiple_of, int(n * share) // multiple_of * multiple_of)) for n in numbers]
