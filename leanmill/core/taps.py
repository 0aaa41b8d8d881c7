"""Hidden states of a frozen model, from one forward a micro-batch for all who read them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.batches import Batch
from leanmill.core.blocks import decoder_blocks
from leanmill.core.errors import ConfigError
from leanmill.core.places import find_modules


@dataclass(frozen=True, kw_only=True)
class HiddenStates:
    """What a frozen model computed for a micro-batch."""

    blocks: Mapping[int, Tensor]
    """[B, S, hidden]: what the tapped decoder blocks returned, by index."""
    last: Tensor
    """[B, S, hidden]: what its head is given."""
    projections: Mapping[tuple[int, str], Tensor] = field(default_factory=dict)
    """[B, S, width]: what the tapped projections of attention returned, by block and name."""


class FrozenTaps:
    """Taps on one frozen model.

    Args:
        load: Returns the model, ready on the run's device; called when first read.
    """

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        self._load = load
        self._model: nn.Module | None = None
        self._layers: set[int] = set()
        self._projections: set[tuple[int, str]] = set()
        self._read: tuple[Tensor, HiddenStates] | None = None

    @property
    def model(self) -> Any:
        """The frozen causal LM, loaded when first asked for."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def want(self, layer: int) -> None:
        """Tap the decoder block of this index."""
        self._layers.add(layer)

    def want_projection(self, layer: int, name: str) -> None:
        """Tap a projection in the attention of the decoder block of this index, e.g. `q_proj`."""
        self._projections.add((layer, name))

    def read(self, batch: Batch) -> HiddenStates:
        """Return what the model computes for `batch`, without gradients; a second reader gets the first one's."""
        ids = batch["input_ids"]
        if self._read is None or self._read[0] is not ids:
            self._read = (ids, self._run(batch))
        return self._read[1]

    def release(self) -> None:
        """Forget the last micro-batch."""
        self._read = None

    @torch.no_grad()
    def _run(self, batch: Batch) -> HiddenStates:
        last: list[Tensor] = []
        found: dict[int, Tensor] = {}
        model = self.model
        blocks = decoder_blocks(model) if self._layers else []
        # The whole model is called, so that a sharding engine gathers what it must, but the head
        # sees a single position; its input for all of them is picked up on the way.
        hooks = [model.base_model.register_forward_hook(lambda *call: last.append(call[-1].last_hidden_state))]
        for layer in self._layers:
            keep = functools.partial(lambda layer, *call: found.__setitem__(layer, hidden_of(call[-1])), layer)
            hooks.append(blocks[layer].register_forward_hook(keep))
        projected: dict[tuple[int, str], Tensor] = {}
        for key in self._projections:
            keep_projected = functools.partial(lambda key, *call: projected.__setitem__(key, call[-1]), key)
            hooks.append(projection_of(model, *key).register_forward_hook(keep_projected))
        try:
            inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
            model(**inputs, use_cache=False, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        return HiddenStates(blocks=found, last=last[0], projections=projected)


def projection_of(model: nn.Module, layer: int, name: str) -> nn.Module:
    """Return the projection `name` in the attention of a decoder block.

    Raises:
        ConfigError: The family has no projection of that name of its own.
    """
    for _, index, attention in find_modules(model, "attention"):
        found = getattr(attention, name, None)
        if index == layer and isinstance(found, nn.Module):
            return found
    raise ConfigError(
        f"block {layer} of a {model.config.model_type} model has no attention with a {name}; choose a family that "  # type: ignore[union-attr]
        f"projects queries, keys and values apart, e.g. llama or qwen3"
    )


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states among what a decoder block returns."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]
