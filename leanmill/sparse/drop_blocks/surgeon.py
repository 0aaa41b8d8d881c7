"""Which parts of a model go, and the model without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.surgery import CalibratedModel, LookingSurgeon, Measure, Part, StoredBlock
from leanmill.sparse.structured.anatomy import Sizes, check_layers, is_output, sizes_of
from leanmill.sparse.structured.cut import highest, smaller_config
from leanmill.sparse.structured.importance import influence


class Dropping(LookingSurgeon):
    """Leaves parts out; see `DropBlocks` for the arguments.

    Args:
        dropped: A number of parts, or a share of them.
        kinds: Of parts that may go.
        measure: For dropping one after another; None drops all at once.
        gates: Given model, candidates and the share that stays, returns how open the gate of each candidate is; None
            drops by influence where `measure` is None too.
        first_layer: See there.
        writes_zeros: See there.
    """

    def __init__(
        self,
        *,
        dropped: int | float,
        kinds: Sequence[Literal["block", "attention", "mlp"]],
        measure: Measure | None,
        gates: Callable[[CalibratedModel, range, float], Tensor] | None,
        first_layer: int,
        writes_zeros: bool,
    ) -> None:
        self.asked, self.kinds, self.measure = dropped, kinds, measure
        self.gates = gates
        self.first_layer, self.writes_zeros = first_layer, writes_zeros
        self.before: Any = None
        self.number = 0
        self.dropped: list[Part] = []
        """In the order they went."""

    def config(self, before: Any) -> Any:
        self.before = before
        sizes_of("drop_blocks", before, mixtures=True)
        num_layers = before.num_hidden_layers
        num_parts = num_layers * len(self.kinds)
        self.number = round(self.asked * num_parts) if isinstance(self.asked, float) else self.asked
        allowed = (num_layers - self.first_layer) * len(self.kinds)
        # Of whole blocks one must stay, for there to be a model.
        most = allowed - (self.first_layer == 0 and "block" in self.kinds)
        if not 1 <= self.number <= most:
            raise ConfigError(
                f"drop_blocks: dropped={self.asked} is {self.number} of {num_parts} parts, {allowed} of which are in "
                f"blocks from first_layer={self.first_layer} on; drop 1 to {max(0, most)}, or choose another "
                f"first_layer"
            )
        if self.writes_zeros:
            return before
        check_layers("drop_blocks", before)
        return self._config(range(num_layers - self.number))

    def _config(self, layers: Sequence[int]) -> Any:
        return smaller_config("drop_blocks", self.before, self._sizes, layers)

    @property
    def _sizes(self) -> Sizes:
        return sizes_of("drop_blocks", self.before, mixtures=True)

    def look(self, model: CalibratedModel) -> Any:
        layers = range(self.first_layer, self.before.num_hidden_layers)
        if self.gates is not None:
            self.dropped = self._lowest(self.gates(model, layers, 1 - self.number / len(layers)), layers)
        elif self.measure is None:
            self.dropped = self._lowest(self._influences(model)[layers.start :], layers)
        else:
            candidates: list[Part] = [(layer, kind) for layer in layers for kind in self.kinds]
            self.dropped = one_after_another(model, candidates, self.number, self.measure)
        return self.before if self.writes_zeros else self._config(self._kept)

    @property
    def _kept(self) -> list[int]:
        gone = {layer for layer, kind in self.dropped if kind == "block"}
        layers = range(self.before.num_hidden_layers)
        return [layer for layer in layers if self.writes_zeros or layer not in gone]

    def _influences(self, model: CalibratedModel) -> Tensor:
        influences = torch.zeros(self.before.num_hidden_layers, dtype=torch.float64)
        for block in model.blocks():
            for before, after in block.run():
                influences[block.index] += influence(before, after)
        return model.total(influences)

    def _lowest(self, scores: Tensor, layers: range) -> list[Part]:
        """The blocks of least score, that first."""
        _check_finite(scores)
        staying = {layers.start + int(index) for index in highest(scores, len(layers) - self.number)}
        gone = [layer for layer in layers if layer not in staying]
        return [(layer, "block") for layer in sorted(gone, key=lambda layer: float(scores[layer - layers.start]))]

    def place(self, index: int) -> int | None:
        kept = self._kept
        return kept.index(index) if index in kept else None

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        kinds = {kind for layer, kind in self.dropped if layer == block.index}
        halves = {"attention", "mlp"} if "block" in kinds else kinds
        for name in sorted(block.names):
            tensor = block.read(name)
            is_zero = any(is_output(name, half) for half in halves)  # type: ignore[arg-type]
            yield name, torch.zeros_like(tensor) if is_zero else tensor

    def describe(self) -> str:
        names = {"block": "block", "attention": "attention", "mlp": "MLP"}
        dropped = ", ".join(f"{names[kind]} {layer}" for layer, kind in self.dropped)
        return f"without {dropped}{', written as zeros' if self.writes_zeros else ''}"


def one_after_another(model: CalibratedModel, parts: Sequence[Part], number: int, measure: Measure) -> list[Part]:
    """Return which parts go, each time that without which the measure is least, of equal ones the first. A collective.

    Args:
        model: The model.
        parts: What may go.
        number: How many go.
        measure: Of the model without those that went.

    Raises:
        RunError: The measure is not finite.
    """
    gone: list[Part] = []
    for _ in range(number):
        left = [part for part in parts if part not in gone]
        found = model.without([frozenset([*gone, part]) for part in left], measure)
        _check_finite(torch.tensor(found))
        gone.append(left[min(range(len(left)), key=found.__getitem__)])
    return gone


def _check_finite(scores: Tensor) -> None:
    if not torch.isfinite(scores).all():
        raise RunError("drop_blocks: blocks put out what is not finite on the calibration rows; look at model and data")
