"""Doing without the second expert at inference, where it weighs little and the token matters to few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.batches import Batch
from leanmill.core.errors import ConfigError
from leanmill.core.ledger import Ledger
from leanmill.core.places import find_modules
from leanmill.core.probes import Finding, Probe
from leanmill.core.sites import Sites
from leanmill.moe.routing.decision import Option, Routing
from leanmill.moe.routing.install import decisions, skip_what_nobody_takes, skips_empty_places
from leanmill.moe.routing.tokens import Tokens


def received(maps: Tensor) -> Tensor:
    """Return the mean attention that each of the last tokens gets from those who may attend to it, [B, S].

    sum_{i >= j} A_ij / (number of i >= j), the mean over heads, for the S tokens of this forward.

    Args:
        maps: [B, heads, S, K]: S queries, the last of K keys.
    """
    length = maps.shape[-2]
    sums = maps.float().mean(1).sum(-2)[:, -length:]
    return sums / torch.arange(length, 0, -1, device=maps.device)


def important(hidden: Tensor, attention: Tensor, share: float) -> Tensor:
    """Return which tokens of each row are the most important, bool [B, S]: `share` of them, rounded down.

    Importance is ||x_j||_1 times what attention the token receives.

    Args:
        hidden: [B, S, H]: what the router sees.
        attention: [B, S], see `received`.
        share: 0 to 1.
    """
    importance = hidden.float().abs().sum(-1) * attention
    number = int(share * importance.shape[1])
    chosen = importance.topk(number, dim=-1).indices
    return torch.zeros_like(importance, dtype=torch.bool).scatter_(1, chosen, torch.ones_like(chosen, dtype=torch.bool))


class LeaveOutSecond(Option):
    """Drops a token's second expert where w_2 < threshold x w_1, unless the token is protected; in eval mode alone.

    The weight of the first then makes up for it where weights are normalised. Huang et al. 2024, arXiv:2410.06270; a
    forward of one token a row, as in decoding, protects none.

    Args:
        threshold: Of the layer.
        protected_share: See `important`.
        normalise: Whether the router's weights are normalised.
    """

    key = "leaves_out_second"
    changes_inference = True
    counted: Tensor
    """fp64 (2,): second choices that were left out since they were read, and all."""

    def __init__(self, threshold: float, protected_share: float, *, normalise: bool) -> None:
        super().__init__()
        self.threshold, self.protected_share, self.normalise = threshold, protected_share, normalise
        self.attention: Tensor | None = None
        """[B, S]: see `received`; of the forward under way, written by the layer's attention."""
        self.is_real: Tensor | None = None
        """bool [B x S]: which positions count; None is all."""
        self._hidden: Tensor | None = None
        self.register_buffer("counted", torch.zeros(2, dtype=torch.float64), persistent=False)

    def on_hidden(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        self._hidden = hidden
        return hidden

    def on_routing(self, routing: Routing) -> Routing:
        if self.training:
            return routing
        first, second = routing.weights.unbind(-1)
        left_out = second < self.threshold * first
        if (protected := self._protected()) is not None:
            left_out &= ~protected
        self._count(left_out)
        is_kept = torch.stack([torch.ones_like(left_out), ~left_out], -1)
        weights = routing.weights.masked_fill(~is_kept, 0)
        if self.normalise:
            weights = weights * (routing.weights.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True))
        return routing._replace(weights=weights, is_kept=is_kept)

    def _protected(self) -> Tensor | None:
        hidden, attention, self._hidden, self.attention = self._hidden, self.attention, None, None
        if self.protected_share == 0:
            return None
        assert hidden is not None
        if attention is None:
            raise ConfigError("mc_moe protects tokens by attention maps; call model.set_attn_implementation('eager')")
        if attention.shape[1] == 1:
            return None
        return important(hidden.view(*attention.shape, -1), attention, self.protected_share).flatten()

    def _count(self, left_out: Tensor) -> None:
        if self.is_real is None:
            num_left_out, number = left_out.sum(), left_out.new_full((), len(left_out), dtype=torch.float64)
        else:
            num_left_out, number = (left_out & self.is_real).sum(), self.is_real.sum()
        self.counted += torch.stack([num_left_out.double(), number.double()])


class LeftOut(Probe):
    """Says how many second choices were left out.

    Args:
        layers: By index of the block.
    """

    name = "mc_moe"

    def __init__(self, layers: Mapping[int, LeaveOutSecond]) -> None:
        self._layers = dict(layers)

    def begin(self, batch: Batch) -> None:
        labels = batch["labels"]
        is_real = (labels != -100).any(1, keepdim=True).expand(labels.shape).reshape(-1)
        for layer in self._layers.values():
            layer.is_real = is_real

    def take(self) -> Tensor:
        counted = torch.cat([layer.counted for layer in self._layers.values()])
        for layer in self._layers.values():
            layer.counted.zero_()
            layer.is_real = None
        return counted

    def find(self, counts: Mapping[str, Tensor]) -> Finding:
        totals = torch.stack(list(counts.values())).sum(0).view(-1, 2)
        shares = (totals[:, 0] / totals[:, 1].clamp(min=1)).tolist()
        by_layer = {f"second_left_out/{layer}": share for layer, share in zip(self._layers, shares, strict=True)}
        return Finding(metrics={"second_left_out": sum(shares) / len(shares)} | by_layer)


def leave_out_second(model: Any, thresholds: Mapping[int, float], *, protected_share: float) -> LeftOut:
    """Have a causal LM do without second experts in eval mode; return what counts them.

    Its attention becomes `eager` where tokens are protected, the one implementation that has maps.

    Args:
        model: Of two experts a token.
        thresholds: By index of the block.
        protected_share: See `important`.

    Raises:
        ConfigError: Its routers or its attention are not understood.
    """
    layers: dict[int, LeaveOutSecond] = {}
    skip_what_nobody_takes(model)
    skips_empty = skips_empty_places(model)()
    for place, decision in decisions(Sites(model), Ledger()):
        layer = -1 if place.layer is None else place.layer
        if layer not in thresholds:
            continue
        option = LeaveOutSecond(thresholds[layer], protected_share, normalise=decision.policy.normalise)
        decision.add(option.to(next(place.module.parameters()).device))
        decision.skips_empty = skips_empty
        layers[layer] = option
    if missing := sorted(thresholds.keys() - layers.keys()):
        raise ConfigError(
            f"mc_moe: layer {missing[0]} has no router, and what it leaves out was calibrated; give the "
            f"folder that leanmill compress wrote, as it was"
        )
    if protected_share > 0:
        _see_attention(model, layers)
    return LeftOut(layers)


def _see_attention(model: Any, layers: Mapping[int, LeaveOutSecond]) -> None:
    model.set_attn_implementation("eager")
    attentions = {layer: module for _, layer, module in find_modules(model, "attention")}
    for layer, option in layers.items():
        if layer not in attentions:
            raise ConfigError(f"mc_moe: layer {layer} has no attention to protect tokens by; set protected_share: 0")
        attentions[layer].register_forward_hook(_note(option))


def _note(option: LeaveOutSecond) -> Any:
    def hook(module: nn.Module, args: Sequence[Any], output: Any) -> None:
        maps = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        option.attention = received(maps) if isinstance(maps, Tensor) and maps.dim() == 4 else None

    return hook
