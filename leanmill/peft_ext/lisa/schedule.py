"""Which layers train in which step."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from leanmill.core.errors import ConfigError
from leanmill.core.noise import derive_seed
from leanmill.core.parameters import ParamRule, TrainableSchedule
from leanmill.core.sites import Sites
from leanmill.core.technique import Installation


class LayerSampling(TrainableSchedule):
    """`num_layers` of the layers, drawn one after another without replacement every `every_steps` steps.

    Each draw gives every layer a number that is a hash of (seed, draw, layer), and takes the smallest: equal on
    all ranks, nothing to save, any step can be asked for. Layers without trainable parameters take no part.

    With weights the number u of (0, 1) is replaced by -log(1 - u) / weight, whose smallest are a draw in proportion to
    the weights (Efraimidis and Spirakis 2006). Layers of weight 0 are drawn when no other is left.

    Args:
        layers: Path of each layer in the plain model, e.g. `model.layers.0`.
        num_layers: Layers that train at a time.
        every_steps: Steps between draws.
        seed: Of the run.
        weights: Of each layer by its path, at least 0; None is uniform.
    """

    technique = "lisa"

    def __init__(
        self,
        layers: Sequence[str],
        num_layers: int,
        every_steps: int,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.weights = weights
        self.layers, self.num_layers, self.every_steps, self.seed = frozenset(layers), num_layers, every_steps, seed
        self._depths = {path.count(".") + 1 for path in layers}

    def drawn(self, layers: Sequence[str], step: int) -> set[str]:
        """Return those of `layers` that train in `step`."""
        draw = step // self.every_steps

        def order(path: str) -> tuple[float, int]:
            number = derive_seed(self.seed, "lisa", draw, path)
            if self.weights is None:
                return 0.0, number
            weight = self.weights[path]
            return (-math.log1p(-(number + 0.5) / 2**63) / weight if weight > 0 else math.inf), number

        return set(sorted(layers, key=order)[: self.num_layers])

    def trained(self, names: Collection[str], step: int) -> set[str]:
        by_layer = self._by_layer(names)
        drawn = self.drawn([path for path in by_layer if path is not None], step)
        return {name for path, members in by_layer.items() if path is None or path in drawn for name in members}

    def heaviest(self, sizes: Mapping[str, int]) -> set[str]:
        by_layer = self._by_layer(sizes)
        always = by_layer.pop(None, [])
        largest = sorted(by_layer.values(), key=lambda members: -sum(sizes[name] for name in members))
        return {name for members in (always, *largest[: self.num_layers]) for name in members}

    def _by_layer(self, names: Collection[str]) -> dict[str | None, list[str]]:
        """Group names by the layer they lie in, None outside of all."""
        found: dict[str | None, list[str]] = {}
        for name in names:
            parts = name.split(".")
            inside = [path for end in self._depths if (path := ".".join(parts[:end])) in self.layers]
            found.setdefault(inside[0] if inside else None, []).append(name)
        return found


def layer_sampling(
    sites: Sites,
    *,
    num_layers: int,
    every_steps: int,
    train_embeddings: bool,
    seed: int | None,
    weights: Sequence[float] | None = None,
) -> Installation:
    """Return an installation under which the layers of the model take turns.

    Args:
        sites: Of the model.
        num_layers: Layers that train at a time.
        every_steps: Steps between draws.
        train_embeddings: Whether embedding and head train beside them.
        seed: Of the run.
        weights: Of the layers, from the first to the last, in proportion to which they are drawn; None is uniform.

    Raises:
        ConfigError: See `Lisa.install`.
    """
    layers = [place.name for place in sites.modules("block")]
    if num_layers > len(layers):
        raise ConfigError(
            f"lisa.num_layers={num_layers} is more than the {len(layers)} layers of the model; set num_layers: "
            f"{len(layers)} or less"
        )
    if weights is not None and len(weights) != len(layers):
        raise ConfigError(
            f"lisa.draw=outliers, and model.path tells of {len(weights)} layers where the model has {len(layers)}; run "
            f"the pass outliers over this model"
        )
    if seed is None:
        raise ConfigError("lisa draws layers and was given no seed; set `seed: 0` in the recipe")
    outside = {candidate.name for candidate in sites.candidates.values() if candidate.kind in ("embedding", "head")}
    frozen = {f"{name}.weight" for name in outside} | {f"{name}.bias" for name in outside}
    rests = ParamRule(technique="lisa", match=frozen.__contains__, trainable=False)
    return Installation(
        trainable_schedule=LayerSampling(
            layers,
            num_layers,
            every_steps,
            seed,
            None if weights is None else dict(zip(layers, weights, strict=True)),
        ),
        param_rules=() if train_embeddings else (rests,),
    )
