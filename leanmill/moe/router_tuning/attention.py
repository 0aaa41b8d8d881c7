"""Attention that whole sequences skip, and the rule that says when too few do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.account import Account, add_once, write_late
from leanmill.core.around import Around, Call, Ring, arounds
from leanmill.core.errors import ConfigError
from leanmill.core.ledger import Ledger
from leanmill.core.rules import StepContext, StepRule
from leanmill.core.sites import Sites
from leanmill.moe.router_tuning.rows import only, rows_to_run
from leanmill.parallel.collectives import sum_over_ranks


_TECHNIQUE = "router_tuning"


class SkippedAttention(Around):
    """Multiplies what attention returns by 1 or 0, one decision for each document of a row.

    In evaluation it is not called for rows that skip it whole.

    A router scores the mean of what the tokens of a document bring into attention. It attends where the sigmoid of that
    is at least one half; the gradient of the decision is taken for that of the sigmoid (straight-through). In fp32.

    Args:
        hidden_size: Width of a token.
        account: Of what the layer attends beyond its target.
        device: Of the model's weights, perhaps meta.
    """

    technique = _TECHNIQUE
    ring = Ring.SCALE
    ran: Tensor
    """fp32 (2,): tokens of this micro-batch that attend, and all."""
    coefficient: Tensor
    """fp32 (1,): 1 where the layer attends more than its target."""

    def __init__(self, hidden_size: int, account: Account, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size, device=device))
        self.account = account
        self._num_parts: int | None = None  # of what attention returns, 0 for a tensor; known once it was called
        self.register_buffer("ran", torch.zeros(2), persistent=False)
        self.register_buffer("coefficient", torch.zeros(1), persistent=False)

    def reset_parameters(self) -> None:
        """Start from zero: every document attends, as without a router."""
        nn.init.zeros_(self.weight)
        self.ran.zero_()
        self.coefficient.zero_()

    def forward(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        """Run attention, and keep what it returns [B, S, H] for the documents that attend."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        decision = self._decide(hidden, kwargs.get("position_ids"))
        output = self._attend(call, hidden, decision, args, kwargs)
        attended, *rest = output if isinstance(output, tuple) else (output,)
        attended = attended * decision.unsqueeze(-1).to(attended.dtype)
        if self.training:
            ran = torch.stack([decision.detach().sum(), decision.new_full((), decision.numel())])
            add_once(self.ran, ran.float())
            attended = self.account.inject(attended, decision.mean().float().reshape(1), self.coefficient)
        return (attended, *rest) if isinstance(output, tuple) else attended

    def _attend(
        self, call: Call, hidden: Tensor, decision: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what attention does; in evaluation, where one process may choose, of rows that skip it zeros."""
        rows = None if self.training else rows_to_run(decision > 0, args, kwargs)
        if rows is None:
            return call(*args, **kwargs)
        if len(rows) == 0 and self._num_parts is not None:
            attended = torch.zeros_like(hidden)
        elif len(rows) == 0:
            output = call(*args, **kwargs)
            self._num_parts = len(output) if isinstance(output, tuple) else 0
            return output
        else:
            num_rows = len(hidden)
            part = call(*only(args, rows, num_rows), **{key: only(one, rows, num_rows) for key, one in kwargs.items()})
            self._num_parts = len(part) if isinstance(part, tuple) else 0
            part = part[0] if isinstance(part, tuple) else part
            attended = part.new_zeros(hidden.shape).index_copy(0, rows, part)
        return (attended, *[None] * (self._num_parts - 1)) if self._num_parts else attended

    def _decide(self, hidden: Tensor, position_ids: Tensor | None) -> Tensor:
        """Return 1 or 0 for every token [B, S], in fp32 or wider."""
        with torch.autocast(hidden.device.type, enabled=False):
            wide = torch.promote_types(hidden.dtype, torch.float32)
            # The score of a mean is the mean of the scores.
            scores = F.linear(hidden.to(wide), self.weight.to(wide)).squeeze(-1)
            likely = _mean_by_document(scores, position_ids).sigmoid()
        return (likely >= 0.5).to(wide) + (likely - likely.detach())

    def fold(self, module: nn.Module) -> None:
        """Refuse: no plain attention skips documents.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "router_tuning skips attention for some documents, which no plain transformers model does; keep the "
            "checkpoint, which holds the routers and `leanmill eval` reads, beside the model it was trained on"
        )


def _mean_by_document(scores: Tensor, position_ids: Tensor | None) -> Tensor:
    """Replace each of `scores` [B, S] by the mean of its document; rows without positions are one document."""
    if position_ids is None:
        return scores.mean(-1, keepdim=True).expand_as(scores)
    documents = (position_ids == 0).long().cumsum(-1).expand(scores.shape)
    sums = scores.new_zeros(scores.shape[0], scores.shape[1] + 1).scatter_add(1, documents, scores)
    sizes = torch.zeros_like(sums).scatter_add(1, documents, torch.ones_like(scores))
    return (sums / sizes.clamp(min=1)).gather(1, documents)


class CapacityRule(StepRule):
    """Compares what layers attend with their target, for all layers at once and all ranks, and reports it.

    Args:
        layers: Their arounds, by index.
        target: Share of the tokens.
    """

    name = _TECHNIQUE

    def __init__(self, layers: Mapping[int, SkippedAttention], target: float) -> None:
        self._layers, self._target = dict(layers), target
        self._ran: Tensor | None = None
        """fp32 [layers, 2]: of all ranks, in the step so far."""

    def begin_step(self, context: StepContext) -> None:
        self._ran = None

    @torch.no_grad()
    def end_forward(self) -> None:
        """Write the coefficients of the micro-batch whose forward has ended; a collective."""
        ran = sum_over_ranks(torch.stack([layer.ran for layer in self._layers.values()]))
        self._ran = ran if self._ran is None else self._ran + ran
        excess = self._ran[:, 0] / self._ran[:, 1] - self._target
        for layer, value in zip(self._layers.values(), excess.unsqueeze(-1), strict=True):
            write_late(layer.coefficient, (value > 0).float())
            layer.account.note(value.clamp(min=0))
            layer.ran.zero_()

    def metrics(self) -> Mapping[str, float]:
        """Return the share of the last step's tokens that attended: each layer's, and their mean."""
        if self._ran is None:
            return {}
        shares = (self._ran[:, 0] / self._ran[:, 1]).tolist()
        by_layer = {f"capacity/{layer}": share for layer, share in zip(self._layers, shares, strict=True)}
        return {"capacity": sum(shares) / len(shares)} | by_layer


def skip_attention(
    sites: Sites,
    ledger: Ledger,
    layers: Callable[[int], range],
    *,
    target_capacity: float,
    capacity_weight: float,
) -> CapacityRule:
    """Stand around attention in some layers.

    Args:
        sites: Of the model.
        ledger: Of the run.
        layers: Given the number of layers, those that get a router.
        target_capacity: Share of the tokens that a layer may attend at no cost.
        capacity_weight: Of what a layer attends beyond that.

    Raises:
        ConfigError: See `RouterTuning.install`.
    """
    places = {place.layer: place for place in sites.modules("attention")}
    hidden_size: int = sites.model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator, assignment]
    device = next(sites.model.parameters()).device
    skipped: dict[int, SkippedAttention] = {}
    for layer in layers(len(sites.modules("block"))):
        if layer not in places:
            raise ConfigError(
                f"router_tuning skips attention, and layer {layer} has none; choose a model whose layers all attend"
            )
        if any(around.technique == _TECHNIQUE for around in arounds(places[layer].module)):
            raise ConfigError("router_tuning is listed twice; keep one entry")
        account = ledger.open(f"{_TECHNIQUE}/{layer}", per="micro_batch", weight=capacity_weight)
        skipped[layer] = SkippedAttention(hidden_size, account, device)
        places[layer].around(skipped[layer])
    rule = CapacityRule(skipped, target_capacity)
    ledger.after_forward(rule.end_forward)
    return rule
