"""Puzzle: alternatives distilled and scored, the choice, and the model that is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from leanmill.core.llama_like import LLAMA_LIKE, check_family, completed
from leanmill.core.surgery import CalibratedModel, LookingSurgeon, SeenBlock, StoredBlock
from leanmill.sparse.puzzle.alternatives import Family, Half, Pair, PartName, begin, belongs
from leanmill.sparse.puzzle.budgets import Budget, choose, read_table, write_table
from leanmill.sparse.puzzle.distillation import Learned, distil, watch
from leanmill.sparse.puzzle.scores import replacement_scores
from leanmill.sparse.structured.anatomy import sizes_of
from leanmill.sparse.structured.timing import is_there, least_times, mean_of_ranks


_NONE = Half(0)
_PARTS: tuple[PartName, ...] = ("attention", "mlp")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked for; see `Puzzle`."""

    key_value_heads: Sequence[int | str] | None
    neurons: Sequence[float | str]
    multiple_of: int
    epochs: int
    lr: float
    score: Literal["kl", "loss"]
    pairs: Literal["scored", "added"]
    parameters: float | None
    memory_bytes: int | None
    speedup: float | None
    batch_size: int
    sequence_length: int
    latency_table: str | None


class PuzzleSurgeon(LookingSurgeon):
    """Replaces attention and MLP layer by layer; see `Puzzle`.

    Args:
        asked: See there.
    """

    def __init__(self, asked: Options) -> None:
        self.asked = asked
        self.family: Family
        self.after: Any = None
        self.library: list[dict[tuple[PartName, Half], Learned]] = []
        """Of each layer, its alternatives."""
        self.scores: NDArray[np.float64]
        """[layers, pairs]."""
        self.chosen: list[Pair] = []
        """Of each layer there is."""
        self._choices: dict[PartName, list[Half]] = {}
        """Alternatives, the half there is first."""
        self._numel: dict[tuple[PartName, Half], int] = {}
        self._stored: torch.dtype = torch.float32
        self._budgets: list[Budget] = []

    def config(self, before: Any) -> Any:
        check_family("puzzle", before, LLAMA_LIKE, "layers of different kinds")
        self.family = Family(before, sizes_of("puzzle", before))
        self._choices = {
            "attention": self.family.attentions(self.asked.key_value_heads),
            "mlp": self.family.mlps(self.asked.neurons, self.asked.multiple_of),
        }
        self.pairs = [Pair(attention, mlp) for attention in self._choices["attention"] for mlp in self._choices["mlp"]]
        self._own = self.family.config([self.family.whole] * self.family.sizes.layers)
        stored = before.dtype
        self._stored = stored if isinstance(stored, torch.dtype) else torch.float32
        self._count()
        self._budgets = self._sizes()
        return self.family.config(self._foreseen())

    # Budgets

    def _count(self) -> None:
        """Count the parameters of each alternative."""
        self._numel = {
            (part, half): sum(
                parameter.numel()
                for name, parameter in self.family.layer(self.family.with_half(part, half)).named_parameters()
                if belongs(name, part)
            )
            for part in _PARTS
            for half in self._choices[part]
        }

    def _parameters(self, pair: Pair) -> int:
        return self._numel["attention", pair.attention] + self._numel["mlp", pair.mlp]

    @property
    def _outside(self) -> int:
        """Parameters in no layer."""
        before = self.family.before
        tables = 1 if before.tie_word_embeddings else 2
        return int(tables * before.vocab_size * before.hidden_size + before.hidden_size)

    def _cache_bytes(self, pair: Pair) -> int:
        """Of keys and values of a layer."""
        numbers = 2 * pair.attention.size * self.family.sizes.head_dim
        return numbers * self._stored.itemsize * self.asked.batch_size * self.asked.sequence_length

    def _sizes(self) -> list[Budget]:
        asked, found = self.asked, []
        parameters = [float(self._parameters(pair)) for pair in self.pairs]
        if asked.parameters is not None:
            there = self._outside + self.family.sizes.layers * self._parameters(self.family.whole)
            most = asked.parameters * there if isinstance(asked.parameters, float) else asked.parameters
            found.append(Budget(name="parameters in layers", taken=parameters, most=int(most) - self._outside))
        if asked.memory_bytes is not None:
            width = self._stored.itemsize
            taken = [width * n + self._cache_bytes(pair) for n, pair in zip(parameters, self.pairs, strict=True)]
            found.append(Budget(name="bytes in layers", taken=taken, most=asked.memory_bytes - width * self._outside))
        return found

    def _foreseen(self) -> list[Pair]:
        """Layers that are all alike, the largest within sizes; how they differ only text and latencies tell."""
        layers = self.family.sizes.layers
        fitting = [
            pair
            for index, pair in enumerate(self.pairs)
            if pair.attention.size and all(layers * one.taken[index] <= one.most for one in self._budgets)
        ]
        with_attention = [pair for pair in self.pairs if pair.attention.size]
        if fitting:
            return [max(fitting, key=self._parameters)] * layers
        return [min(with_attention, key=self._parameters)] * layers

    def _latencies(self, model: CalibratedModel, layer: nn.Module) -> Budget:
        """Of each pair, read or measured; a collective."""
        asked, path = self.asked, self.asked.latency_table
        halves = [(part, half) for part in _PARTS for half in self._choices[part] if half != _NONE]
        if path is not None and is_there(model, path, "puzzle"):
            table = read_table(path, halves)
        else:
            table = mean_of_ranks(model, self._measured(halves, next(layer.parameters())))
            if path is not None:
                write_table(path, table)
        table |= {(part, _NONE.name): 0.0 for part in _PARTS}
        taken = [table["attention", pair.attention.name] + table["mlp", pair.mlp.name] for pair in self.pairs]
        assert asked.speedup is not None
        whole = taken[self.pairs.index(self.family.whole)]
        most = self.family.sizes.layers * whole / asked.speedup
        return Budget(name="microseconds in layers", taken=taken, most=most)

    def _measured(self, halves: Sequence[tuple[PartName, Half]], like: Tensor) -> dict[tuple[PartName, str], float]:
        sizes = self.family.sizes
        shape = (self.asked.batch_size, self.asked.sequence_length, sizes.hidden)
        hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
        tables = hidden.new_ones(*shape[:2], sizes.head_dim)
        jobs: dict[tuple[PartName, str], Any] = {}
        for part, half in halves:
            layer = self.family.layer(self.family.with_half(part, half)).to(like.dtype).to_empty(device=like.device)
            for parameter in layer.parameters():
                parameter.data.fill_(0.01)
            jobs[part, half.name] = lambda layer=layer, part=part: _run_half(layer, part, hidden, (tables, tables))  # type: ignore[misc]
        return least_times(jobs, hidden.device)

    # Alternatives

    def look(self, model: CalibratedModel) -> Any:
        self.library = []
        for block in model.blocks():
            if self.asked.speedup is not None and not self.library:
                self._budgets = [*self._sizes(), self._latencies(model, block.module)]
            self.library.append(self._alternatives(block, model))
        self.scores = self._scored(model)
        self.chosen = choose(self.scores, self.pairs, self._budgets)
        self.after = self.family.config([pair for pair in self.chosen if not pair.is_nothing])
        return self.after

    def _alternatives(self, block: SeenBlock, model: CalibratedModel) -> dict[tuple[PartName, Half], Learned]:
        """Distil every alternative to a layer; a collective."""
        seen, whole = watch(block, model.total), self._state(block.module)
        function: str = block.module.get_submodule("self_attn").config._attn_implementation  # type: ignore[union-attr, assignment]
        found = {}
        for part in _PARTS:
            for half in self._choices[part][1:]:
                begun = begin(half, part, whole, self.family.sizes, seen.contributions)
                others = {name: tensor for name, tensor in whole.items() if not belongs(name, part)}
                layer = self.family.layer(self.family.with_half(part, half), function)
                layer.load_state_dict(others | begun, assign=True)
                found[part, half] = distil(
                    layer, part, seen, model.total, epochs=self.asked.epochs, lr=self.asked.lr, dtype=self._stored
                )
        return found

    def _state(self, layer: nn.Module) -> dict[str, Tensor]:
        """The tensors of a layer as the new family has them, fp32."""
        tensors = ((name, tensor.detach().float()) for name, tensor in layer.state_dict().items())
        return dict(completed(self._own, self.family.sizes.hidden, tensors))

    def _scored(self, model: CalibratedModel) -> NDArray[np.float64]:
        """The scores of all pairs [layers, pairs], 0 of layers as they are; a collective."""
        layers, whole = range(self.family.sizes.layers), self.family.whole
        tried = [pair for pair in self.pairs if pair != whole]
        if self.asked.pairs == "added":
            tried = [self.family.with_half(part, half) for part in _PARTS for half in self._choices[part][1:]]
        replaced = [(index, pair) for index in layers for pair in tried]
        scores = replacement_scores(
            model, [index for index, _ in replaced], partial(self._built, replaced), self.asked.score
        )
        of = dict(zip(replaced, scores, strict=True)) | {(index, whole): 0.0 for index in layers}
        if self.asked.pairs == "scored":
            return np.array([[of[index, pair] for pair in self.pairs] for index in layers])
        alone = self.family.with_half
        return np.array(
            [
                [of[index, alone("attention", p.attention)] + of[index, alone("mlp", p.mlp)] for p in self.pairs]
                for index in layers
            ]
        )

    def _built(self, replaced: Sequence[tuple[int, Pair]], number: int, parent: nn.Module) -> nn.Module:
        """A replacement of a layer, its learned halves beside those of the layer that stay."""
        index, pair = replaced[number]
        function: str = parent.get_submodule("self_attn").config._attn_implementation  # type: ignore[union-attr, assignment]
        layer: nn.Module = self.family.layer(pair, function)
        device = next(parent.parameters()).device
        state: dict[str, Tensor] = {}
        for part, half in pair.halves:
            learned = self.library[index].get((part, half))
            if learned is None:
                state |= {name: tensor for name, tensor in self._state(parent).items() if belongs(name, part)}
            else:
                state |= {name: tensor.to(device).float() for name, tensor in learned.tensors.items()}
        layer.load_state_dict(state, assign=True)
        return layer

    # The model

    def place(self, index: int) -> int | None:
        if self.chosen[index].is_nothing:
            return None
        return sum(not pair.is_nothing for pair in self.chosen[:index])

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        pair, library = self.chosen[block.index], self.library[block.index]
        kept = []
        for part, half in pair.halves:
            learned = library.get((part, half))
            if learned is None:
                kept += [name for name in sorted(block.names) if belongs(name, part)]
            else:
                yield from learned.tensors.items()
        yield from completed(self.after, self.family.sizes.hidden, ((name, block.read(name)) for name in kept))

    def describe(self) -> str:
        whole, layers = self.family.whole, self.family.sizes.layers
        rows = [self.pairs.index(pair) for pair in self.chosen]
        lost = float(sum(self.scores[layer, row] for layer, row in enumerate(rows)))
        before, after = layers * self._parameters(whole), sum(map(self._parameters, self.chosen))
        caches = layers * self._cache_bytes(whole), sum(map(self._cache_bytes, self.chosen))
        kinds = "; ".join(
            f"{part} {', '.join(f'{name} x{n}' for name, n in Counter(names).items())}"
            for part, names in (
                ("attention (key-value heads)", [pair.attention.name for pair in self.chosen]),
                ("mlp (neurons)", [pair.mlp.name for pair in self.chosen]),
            )
        )
        unit = "nats of KL" if self.asked.score == "kl" else "nats of loss"
        return (
            f"{kinds}; {self._outside + after:,} of {self._outside + before:,} parameters; a cache of "
            f"{caches[1]:,} bytes in place of {caches[0]:,}; scores add up to {lost:.4g} {unit} a token"
        )


def _run_half(layer: Any, part: PartName, hidden: Tensor, tables: tuple[Tensor, Tensor]) -> Any:
    """An attention or MLP with its norm, as a layer runs it."""
    if part == "mlp":
        normed = layer.post_attention_layernorm(hidden)
        return layer.mlp(normed) if hasattr(layer, "mlp") else layer.mlp_linear(normed)
    normed = layer.input_layernorm(hidden)
    if hasattr(layer, "attention_linear"):
        return layer.attention_linear(normed)
    return layer.self_attn(hidden_states=normed, position_embeddings=tables, attention_mask=None)
