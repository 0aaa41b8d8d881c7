"""Minitron's importances, and what they leave of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.surgery import CalibratedModel, LookingSurgeon, StoredBlock
from leanmill.sparse.structured.anatomy import Sizes, check_hidden, check_layers, is_mixture, sizes_of
from leanmill.sparse.structured.cut import Cutter, Kept, heads_in_groups, highest, smaller_config
from leanmill.sparse.structured.importance import (
    HEADS,
    NEURONS,
    NORMS,
    Activations,
    gradient_of_heads,
    influence,
    losses_without,
)
from leanmill.sparse.structured.targets import Targets


@dataclass(frozen=True)
class _Plan:
    before: Any
    """transformers configuration of the model there is."""
    old: Sizes
    new: Sizes


class MinitronSurgeon(LookingSurgeon):
    """Cuts a model to sizes; see `Minitron` for the arguments."""

    def __init__(
        self,
        *,
        targets: Mapping[str, int | float | None],
        multiple_of: int,
        by_gradients: bool,
        by_loss: bool,
        scales_norms: bool,
    ) -> None:
        self.targets, self.multiple_of = targets, multiple_of
        self.by_gradients, self.by_loss, self.scales_norms = by_gradients, by_loss, scales_norms
        self._plan: _Plan | None = None
        self._cutter: Cutter | None = None

    @property
    def plan(self) -> _Plan:
        """What `config` found."""
        assert self._plan is not None
        return self._plan

    @property
    def cutter(self) -> Cutter:
        """What `look` decided."""
        assert self._cutter is not None
        return self._cutter

    def config(self, before: Any) -> Any:
        old = sizes_of("minitron", before, mixtures=True)
        new = Targets(technique="minitron", asked=self.targets, multiple_of=self.multiple_of).sizes(old)
        if new.hidden < old.hidden:
            check_hidden("minitron", before)
        if new.layers < old.layers:
            check_layers("minitron", before)
        if is_mixture(before) and new.neurons < old.neurons:
            raise ConfigError(
                "minitron cuts the neurons of dense MLPs, and this model has experts; leave intermediate_size out"
            )
        self._plan = _Plan(before, old, new)
        return self._config(range(new.layers))

    def _config(self, layers: Any) -> Any:
        after = smaller_config("minitron", self.plan.before, self.plan.new, list(layers))
        if self.scales_norms:
            after.rms_norm_eps = self.plan.before.rms_norm_eps * self.plan.old.hidden / self.plan.new.hidden
        return after

    def look(self, model: CalibratedModel) -> Any:
        old, new = self.plan.old, self.plan.new
        activations, influences = self._see(model)
        layers = self._layers(model, influences)
        heads, groups = self._chosen_heads(model, activations)
        hidden = neurons = None
        if new.hidden < old.hidden:
            scores = [activations.norm(layer, norm) for layer in range(old.layers) for norm in NORMS]
            hidden = highest(torch.stack(scores).sum(0), new.hidden)
        if new.neurons < old.neurons:
            neurons = [highest(activations.norm(layer, NEURONS), new.neurons) for layer in range(old.layers)]
        kept = Kept(layers=layers, hidden=hidden, heads=heads, groups=groups, neurons=neurons)
        scale = math.sqrt(old.hidden / new.hidden) if self.scales_norms else 1.0
        self._cutter = Cutter(old, kept, norm_scale=scale)
        return self._config(layers)

    def _see(self, model: CalibratedModel) -> tuple[Activations, Tensor]:
        """Activations and block influences [layers] on all rows of all ranks."""
        old, new = self.plan.old, self.plan.new
        activations, influences = Activations(), torch.zeros(old.layers, dtype=torch.float64)
        inputs = [*([HEADS] if new.heads < old.heads else []), *([NEURONS] if new.neurons < old.neurons else [])]
        outputs = NORMS if new.hidden < old.hidden else ()
        for block in model.blocks():
            with activations.watch(block, inputs, outputs):
                for before, after in block.run():
                    influences[block.index] += influence(before, after)
        activations.total(model)
        return activations, model.total(influences)

    def _layers(self, model: CalibratedModel, influences: Tensor) -> list[int]:
        if self.plan.new.layers == self.plan.old.layers:
            return list(range(self.plan.old.layers))
        scores = influences
        if self.by_loss:
            losses = losses_without(model, [(layer, "block") for layer in range(self.plan.old.layers)])
            scores = torch.tensor(list(losses.values()), dtype=torch.float64)
        if not torch.isfinite(scores).all():
            raise RunError("minitron: layers put out what is not finite on the calibration rows; look at the data")
        return [int(layer) for layer in highest(scores, self.plan.new.layers)]

    def _chosen_heads(
        self, model: CalibratedModel, activations: Activations
    ) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """Query heads and key-value heads of each layer that stay."""
        old, new = self.plan.old, self.plan.new
        if new.heads == old.heads:
            return None, None
        if self.by_gradients:
            scores = gradient_of_heads(model, old.heads, old.layers)
        else:
            scores = [
                activations.norm(layer, HEADS).view(old.heads, old.head_dim).norm(dim=1) for layer in range(old.layers)
            ]
        chosen = [heads_in_groups(score, old.groups, new.heads, new.groups) for score in scores]
        return [heads for heads, _ in chosen], [groups for _, groups in chosen]

    def place(self, index: int) -> int | None:
        return self.cutter.place(index)

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        return self.cutter.block(block)

    def outside(self, name: str, tensor: Tensor) -> Tensor:
        return self.cutter.outside(name, tensor)

    def describe(self) -> str:
        words = {
            "hidden": "channels",
            "neurons": "neurons",
            "heads": "query heads",
            "groups": "key-value heads",
            "layers": "layers",
        }
        sizes = [(getattr(self.plan.old, key), getattr(self.plan.new, key), word) for key, word in words.items()]
        cut = "; ".join(f"{old} {word} cut to {new}" for old, new, word in sizes if new < old)
        gone = sorted(set(range(self.plan.old.layers)) - set(self.cutter.kept.layers))
        return f"{cut} (without layers {', '.join(map(str, gone))})" if gone else cut
