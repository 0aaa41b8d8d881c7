"""ZipLM: what each layer's sizes cost in error and in time, the choice, and the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.least_error import least_error
from leanmill.core.levels import Space
from leanmill.core.surgery import CalibratedModel, SeenBlock, StoredBlock
from leanmill.sparse.structured.cut import rows_of_heads
from leanmill.sparse.structured.importance import HEADS, NEURONS, Grams
from leanmill.sparse.structured.timing import is_there, mean_of_ranks
from leanmill.sparse.structured.uneven import Chosen, UnevenSurgeon, evenly, query_heads_of
from leanmill.sparse.structured.widths import Widths, config_with
from leanmill.sparse.ziplm.latency import Latencies, Setting, measure, read_table, write_table
from leanmill.sparse.ziplm.removal import Removal, in_turn, refitted


_NANOSECONDS = 1000
"""In a microsecond: costs are whole nanoseconds."""


@dataclass(frozen=True)
class Target:
    """One model of those that are written."""

    asked: float
    """Speedup."""
    reached: float
    """By the table."""
    chosen: Chosen


class ZipLmSurgeon(UnevenSurgeon):
    """Removes heads and neurons, and refits what is left; see `ZipLm` for the arguments.

    Args:
        speedups: Of the model to be, and of further ones.
        setting: Of the latencies.
        damping: See there.
        shrink: See there.
        multiple_of: See there.
    """

    technique: ClassVar[str] = "ziplm"

    def __init__(
        self, *, speedups: Sequence[float], setting: Setting, damping: float, shrink: float, multiple_of: int
    ) -> None:
        super().__init__()
        self.speedups, self.setting, self.damping = speedups, setting, damping
        self.shrink, self.multiple_of = shrink, multiple_of
        self.targets: list[Target] = []
        self._columns: dict[tuple[int, int, str], Tensor] = {}
        """What output projections become, by target, layer and name."""
        self._now = 0

    def expected(self) -> Widths:
        return replace(self.widths, neurons=evenly(self.widths.neurons, 1 / self.speedups[0], self.multiple_of))

    def choose(self, model: CalibratedModel) -> Chosen:
        removals: list[dict[str, Removal]] = []
        latencies: Latencies | None = None
        for block in model.blocks():
            latencies = latencies or self._latencies(model, block)
            grams = self._grams(model, block)
            removals.append(
                {
                    part: in_turn(self._weight(block, part), gram, self._group_size(block.index, part), self.damping)
                    for part, gram in grams.items()
                }
            )
        assert latencies is not None
        self.targets = [self._target(speedup, removals, latencies) for speedup in self.speedups]
        for block in model.blocks():
            self._refit(block, self._grams(model, block))
        return self.targets[0].chosen

    def _weight(self, block: SeenBlock, part: str) -> Tensor:
        return block.module.get_parameter(f"{part}.weight").detach().double()

    def _parts(self, layer: int) -> list[str]:
        return [
            *([HEADS] if self.widths.heads[layer] else []),
            *([NEURONS] if self.widths.neurons[layer] else []),
        ]

    def _group_size(self, layer: int, part: str) -> int:
        return self._shared(layer) * self.sizes.head_dim if part == HEADS else 1

    def _shared(self, layer: int) -> int:
        """Query heads of a key-value head."""
        return self.widths.heads[layer] // max(1, self.widths.groups[layer])

    def _grams(self, model: CalibratedModel, block: SeenBlock) -> dict[str, Tensor]:
        grams = Grams()
        parts = self._parts(block.index)
        with grams.watch(block, parts):
            for _ in block.run():
                pass
        device = next(block.module.parameters()).device
        return {part: grams.whole(model, block.index, part).to(device) for part in parts}

    # Sizes and their costs

    def _neurons(self, there: int) -> list[int]:
        """Numbers of neurons to choose from, rising, 0 and all of them included."""
        found, size = {0, there}, float(there)
        while size >= self.multiple_of:
            found.add(min(there, int(size / self.multiple_of) * self.multiple_of))
            size *= self.shrink
        return sorted(found)

    def _latencies(self, model: CalibratedModel, block: SeenBlock) -> Latencies:
        path = self.setting.table
        groups = sorted({number for there in set(self.widths.groups) for number in range(1, there + 1)})
        neurons = sorted({size for there in set(self.widths.neurons) for size in self._neurons(there)} - {0})
        if path is not None and is_there(model, path, self.technique):
            found = read_table(path)
            for kind, wanted, table in (("groups", groups, found.groups), ("neurons", neurons, found.neurons)):
                lacking = [size for size in wanted if size not in table]
                if lacking:
                    raise ConfigError(
                        f"ziplm.latency_table {path} has no {kind} of size {lacking[0]}; remove the file to have it "
                        f"measured here, or choose shrink and multiple_of as it was measured"
                    )
            return replace(found, groups={0: 0.0} | found.groups, neurons={0: 0.0} | found.neurons)
        parameter = next(block.module.parameters())
        shape = (self.setting.batch_size, self.setting.sequence_length, self.sizes.hidden)
        hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(parameter.device, parameter.dtype)
        measured = measure(lambda g, n: self._layer(g, n, hidden), groups, neurons, hidden)
        found = _agreed(model, measured)
        if path is not None:
            write_table(path, found)
        return found

    def _layer(self, groups: int, neurons: int, hidden: Tensor) -> tuple[Any, dict[str, Any]]:
        """A decoder layer of these sizes, and what its attention is called with."""
        from transformers import AutoModelForCausalLM

        shared = max(self._shared(layer) for layer in range(self.sizes.layers))
        widths = Widths(heads=[groups * shared], groups=[groups], neurons=[neurons])
        config = config_with(self.technique, self.before, widths, [0], own=True)
        config.vocab_size = 8  # nothing is looked up
        config.pad_token_id = None
        body: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(hidden).eval().model
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        turned = body.rotary_emb(hidden, position_ids=positions)
        return body.layers[0], {"position_embeddings": turned, "attention_mask": None}

    def _target(self, speedup: float, removals: Sequence[dict[str, Removal]], latencies: Latencies) -> Target:
        units = [(layer, part) for layer in range(self.sizes.layers) for part in self._parts(layer)]
        sizes = [self._choices(layer, part) for layer, part in units]
        costs, errors = [], []
        for (layer, part), choices in zip(units, sizes, strict=True):
            table = latencies.groups if part == HEADS else latencies.neurons
            costs.append(_rising([round(table[size] * _NANOSECONDS) for size in choices]))
            of_removed = removals[layer][part].errors
            errors.append([float(of_removed[choices[-1] - size]) for size in choices])
        dense = sum(of_unit[-1] for of_unit in costs)
        space = Space(tuple(costs), int(dense / speedup))
        state = least_error(space, errors, technique=self.technique)
        kept = {unit: sizes[index][level] for index, (unit, level) in enumerate(zip(units, state, strict=True))}
        return Target(speedup, dense / max(1, space.cost(state)), self._chosen(kept, removals))

    def _choices(self, layer: int, part: str) -> list[int]:
        return (
            list(range(self.widths.groups[layer] + 1)) if part == HEADS else self._neurons(self.widths.neurons[layer])
        )

    def _chosen(self, kept: dict[tuple[int, str], int], removals: Sequence[dict[str, Removal]]) -> Chosen:
        heads, groups, neurons = [], [], []
        for layer, of_layer in enumerate(removals):
            index = {
                part: removal.order[len(removal.order) - kept[layer, part] :].sort().values
                for part, removal in of_layer.items()
            }
            none = torch.zeros(0, dtype=torch.int64)
            groups.append(index.get(HEADS, none))
            heads.append(query_heads_of(groups[-1], self._shared(layer)))
            neurons.append(index.get(NEURONS, none))
        return Chosen(heads=heads, groups=groups, neurons=neurons)

    # The models

    def _refit(self, block: SeenBlock, grams: dict[str, Tensor]) -> None:
        for number, target in enumerate(self.targets):
            for part, gram in grams.items():
                kept = target.chosen.neurons[block.index]
                if part == HEADS:
                    kept = rows_of_heads(target.chosen.heads[block.index], self.sizes.head_dim)
                if not len(kept):
                    continue
                weight = self._weight(block, part)
                columns = refitted(weight, gram, kept.to(weight.device), self.damping)
                if not torch.isfinite(columns).all():
                    raise RunError(
                        f"ziplm: {part} of layer {block.index} cannot be solved at damping {self.damping:g}; set "
                        f"damping: {10 * self.damping:g}"
                    )
                dtype = block.module.get_parameter(f"{part}.weight").dtype
                self._columns[number, block.index, f"{part}.weight"] = columns.to(dtype).cpu()

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().block(block):
            columns = self._columns.get((self._now, block.index, name))
            yield name, tensor if columns is None else columns.to(tensor.dtype).contiguous()

    def further(self) -> Iterator[tuple[str, Any]]:
        for number, target in enumerate(self.targets[1:], 1):
            self._now = number
            yield f"speedup-{target.asked:g}", self.take(target.chosen)
        self._now = 0
        self.take(self.targets[0].chosen)

    def describe(self) -> str:
        first, *others = self.targets
        further = "".join(f"; speedup-{target.asked:g} reaches {target.reached:.2f}" for target in others)
        return f"{super().describe()}, {first.reached:.2f} times faster by the table{further}"


def _rising(costs: Sequence[int]) -> tuple[int, ...]:
    """Costs of rising sizes as they were measured, but none below that of a smaller size."""
    found: list[int] = []
    for cost in costs:
        found.append(max([cost, *found[-1:]]))
    return tuple(found)


def _agreed(model: CalibratedModel, latencies: Latencies) -> Latencies:
    """The mean over ranks, each of which measured."""
    return Latencies(groups=mean_of_ranks(model, latencies.groups), neurons=mean_of_ranks(model, latencies.neurons))
