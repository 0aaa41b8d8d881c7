"""What a whole model loses with one of its layers replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.surgery import CalibratedModel


_Score = Literal["kl", "loss"]


def replacement_scores(
    model: CalibratedModel,
    replaced: Sequence[int],
    build: Callable[[int, nn.Module], nn.Module],
    score: _Score,
) -> list[float]:
    """Return the score of the model with each replacement in turn, a mean over tokens, nats. A collective.

    Args:
        model: Whose layers are replaced one at a time; all of it is loaded.
        replaced: Which layer each replacement stands in the place of.
        build: Returns a replacement, fp32 on its device, by its number and the layer that it replaces.
        score: `kl` is KL(before || after) of the next token's probabilities at every token, `loss` what the
            cross-entropy of the next token rises by.
    """
    whole: Any = model.whole()
    layers: nn.ModuleList = whole.base_model.layers
    device = next(whole.parameters()).device
    sums = torch.zeros(len(replaced), 2, dtype=torch.float64)
    for batch in model.rows:
        rows = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
        inputs, before = _as_it_was(whole, layers, rows)
        for number, index in enumerate(replaced):
            layer = build(number, layers[index])
            after = _with(whole, layers, index, layer, inputs[index], rows)
            found = _score(before, after, rows["input_ids"], score)
            sums[number] += torch.tensor([float(found.double().sum()), found.numel()])
    return [float(value / tokens) for value, tokens in model.total(sums)]


def _score(before: Tensor, after: Tensor, ids: Tensor, score: _Score) -> Tensor:
    if score == "kl":
        return F.kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    losses = [
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        for logits in (after, before)
    ]
    return losses[0] - losses[1]


@torch.no_grad()
def _as_it_was(whole: Any, layers: nn.ModuleList, rows: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """What each layer is given, and the logits fp32."""
    inputs: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, given, named: inputs.append(given[0] if given else named["hidden_states"]), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        logits = whole(**rows, use_cache=False).logits.float()
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, logits


@torch.no_grad()
def _with(
    whole: Any, layers: nn.ModuleList, index: int, layer: nn.Module, given: Tensor, rows: Mapping[str, Tensor]
) -> Tensor:
    """The logits with another layer at `index`; what lies before it is not computed again."""
    base = whole.base_model
    base.layers = nn.ModuleList([*(_Given(given) for _ in range(index)), layer, *layers[index + 1 :]])
    try:
        logits: Tensor = whole(**rows, use_cache=False).logits.float()
    finally:
        base.layers = layers
    return logits


class _Given(nn.Module):
    """Stands for layers whose output is known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.__dict__["_hidden"] = hidden

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = self.__dict__["_hidden"]
        return found
