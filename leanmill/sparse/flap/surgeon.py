"""Fluctuation of heads and neurons, and the model without those that fluctuate least."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.core.surgery import CalibratedModel, LookingSurgeon, StoredBlock
from leanmill.sparse.flap.fluctuation import BIASES, fluctuation, replaced, with_biases
from leanmill.sparse.structured.anatomy import Sizes, sizes_of
from leanmill.sparse.structured.cut import Cutter, Kept, heads_in_groups, highest, rows_of_heads, smaller_config
from leanmill.sparse.structured.importance import HEADS, NEURONS, Moments
from leanmill.sparse.structured.targets import Targets


@dataclass(frozen=True)
class _Plan:
    before: Any
    """transformers configuration of the model there is."""
    old: Sizes
    new: Sizes

    @property
    def parts(self) -> list[str]:
        """What writes the output of the parts that are cut."""
        heads = [HEADS] if self.new.heads < self.old.heads else []
        return heads + ([NEURONS] if self.new.neurons < self.old.neurons else [])


class FlapSurgeon(LookingSurgeon):
    """Cuts heads and neurons; see `Flap`.

    Args:
        targets: Sizes of the model to be.
    """

    def __init__(self, targets: Targets) -> None:
        self.targets = targets
        self._plan: _Plan | None = None
        self._cutter: Cutter | None = None
        self.biases: dict[str, Tensor] = {}
        """What is added to the residual stream in place of what goes [hidden], by layer and name of the projection."""

    @property
    def plan(self) -> _Plan:
        """What `config` found."""
        assert self._plan is not None
        return self._plan

    def config(self, before: Any) -> Any:
        old = sizes_of("flap", before)
        self._plan = _Plan(before, old, self.targets.sizes(old))
        for part in self.plan.parts:
            setting = BIASES[part][0]
            if not hasattr(before, setting):
                raise ConfigError(
                    f"flap puts a bias behind what it cuts, and a {before.model_type} has no {setting}; give a model "
                    f"such as llama, or type minitron, which leaves no bias"
                )
        return self._config()

    def _config(self) -> Any:
        after = smaller_config("flap", self.plan.before, self.plan.new, range(self.plan.old.layers))
        for part in self.plan.parts:
            setattr(after, BIASES[part][0], True)
        return after

    def look(self, model: CalibratedModel) -> Any:
        moments = Moments()
        heads: list[Tensor] = []
        groups: list[Tensor] = []
        neurons: list[Tensor] = []
        for block in model.blocks():
            with moments.watch(block, self.plan.parts):
                for _ in block.run():
                    pass
            for part in self.plan.parts:
                weight = block.module.get_parameter(f"{part}.weight").detach().double().cpu()
                mean, variance = moments.mean_and_variance(model, block.index, part)
                scores = fluctuation(variance, weight)
                if part == HEADS:
                    of_layer, of_groups = self._chosen_heads(scores)
                    heads.append(of_layer)
                    groups.append(of_groups)
                    kept = rows_of_heads(of_layer, self.plan.old.head_dim)
                else:
                    kept = highest(scores, self.plan.new.neurons)
                    neurons.append(kept)
                self.biases[f"{block.index}.{part}"] = replaced(weight, mean, kept)
        layers = list(range(self.plan.old.layers))
        found = Kept(layers=layers, heads=heads or None, groups=groups or None, neurons=neurons or None)
        self._cutter = Cutter(self.plan.old, found)
        return self._config()

    def _chosen_heads(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        old, new = self.plan.old, self.plan.new
        of_heads = scores.view(old.heads, -1).sum(1)
        # A key-value head counts for the sum over its query heads.
        return heads_in_groups(of_heads.sqrt(), old.groups, new.heads, new.groups)

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        assert self._cutter is not None
        biases = {part: self.biases[f"{block.index}.{part}"] for part in self.plan.parts}
        return with_biases(self._cutter.block(block), block.names, biases)

    def describe(self) -> str:
        words = {"heads": "query heads", "groups": "key-value heads", "neurons": "neurons"}
        sizes = [(getattr(self.plan.old, key), getattr(self.plan.new, key), word) for key, word in words.items()]
        cut = "; ".join(f"{old} {word} cut to {new}" for old, new, word in sizes if new < old)
        return f"{cut}, biases in their place"
