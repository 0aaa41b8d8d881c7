"""The objective with balance losses written out in plain code over all micro-batches of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.moe.batches import num_valid


Steps = Sequence[Sequence[dict[str, Tensor]]]
"""[rank][micro-batch]."""


@dataclass(kw_only=True)
class Found:
    gradients: dict[str, Tensor]
    balance: float
    z: float
    device: float
    communication: float
    counts: list[Tensor] = field(default_factory=list)
    """[E] of each layer."""


@dataclass(kw_only=True)
class _Part:
    """What one router did with one micro-batch."""

    shares: Tensor
    z: Tensor
    experts: Tensor
    mask: Tensor
    num_experts: int
    num_rows: int

    def places(self, rows: slice = slice(None)) -> Tensor:
        one_hot = F.one_hot(self.experts, self.num_experts).sum(1) * self.mask.unsqueeze(1)
        return one_hot[rows].sum(0).float()


def shares_by_hand(logits: Tensor, family: str) -> Tensor:
    if family == "deepseek_v3":
        scores = torch.sigmoid(logits)
        return scores / scores.sum(-1, keepdim=True)
    return torch.softmax(logits, -1)


def parts_of(model: nn.Module, batch: dict[str, Tensor], family: str) -> tuple[Tensor, list[_Part]]:
    """Summed cross-entropy of a micro-batch, and what its routers did."""
    routed: list[tuple[Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda *call: routed.append((call[-1][0].float(), call[-1][2])))
        for name, module in model.named_modules()
        if name.endswith("mlp.gate")
    ]
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    for hook in hooks:
        hook.remove()
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum")
    mask = batch.get("token_mask", torch.ones_like(batch["labels"], dtype=torch.bool)).flatten()
    found = [
        _Part(
            shares=shares_by_hand(scores, family) * mask.unsqueeze(1),
            z=torch.logsumexp(scores, -1).square() * mask,
            experts=experts,
            mask=mask,
            num_experts=scores.shape[1],
            num_rows=len(batch["labels"]),
        )
        for scores, experts in routed
    ]
    return loss, found


def factor(places: Tensor) -> Tensor:
    return len(places) * places / places.sum()


def of_rows(part: _Part) -> Tensor:
    """Mean over rows of E sum f P."""
    losses = []
    for row in torch.arange(len(part.mask)).chunk(part.num_rows):
        rows = slice(int(row[0]), int(row[-1]) + 1)
        losses.append((factor(part.places(rows)) * part.shares[rows].sum(0)).sum() / part.mask[rows].sum())
    return torch.stack(losses).mean()


def by_hand(
    model: nn.Module,
    steps: Steps,
    *,
    family: str = "mixtral",
    scope: str = "global_batch",
    estimator: str = "running",
    last_counts: list[Tensor] | None = None,
    weights: dict[str, float],
    devices: tuple[int, int] | None = None,
    cross_entropy: float = 1.0,
) -> Found:
    """Gradients of the objective and its parts; `weights` of balance, z, device and communication."""
    num_micro = len(steps[0])
    labels = num_valid([batch for rank in steps for batch in rank])
    every = [[parts_of(model, batch, family) for batch in rank] for rank in steps]
    objective = cross_entropy * torch.stack([loss for rank in every for loss, _ in rank]).sum() / labels
    sums = dict.fromkeys(("balance", "z", "device", "communication"), 0.0)
    num_layers = len(every[0][0][1])
    counts = []
    for layer in range(num_layers):
        grid = [[rank[micro][1][layer] for micro in range(num_micro)] for rank in every]
        flat = [part for rank in grid for part in rank]
        tokens = sum(part.mask.sum() for part in flat)
        counts.append(sum(part.places() for part in flat))

        def known(rank: int, micro: int, grid: Any = grid, layer: int = layer) -> list[_Part]:
            """The parts whose loads the factors of this one are made of."""
            if scope == "micro_batch":
                return [grid[rank][micro]]
            if scope == "data_parallel":
                return [row[micro] for row in grid]
            upto = num_micro if estimator == "two_pass" else micro + 1
            return [row[m] for row in grid for m in range(upto)]

        losses = dict.fromkeys(sums, torch.zeros(()))
        losses["z"] = torch.stack([part.z.sum() for part in flat]).sum() / tokens
        for rank, row in enumerate(grid):
            for micro, part in enumerate(row):
                if scope == "sequence":
                    losses["balance"] = losses["balance"] + of_rows(part) / len(flat)
                    continue
                among = known(rank, micro)
                places = sum(one.places() for one in among)
                if last_counts is not None:
                    places = places + last_counts[layer] * (1 - (micro + 1) / num_micro)
                # The mean over everything whose mean the loss is.
                if scope == "micro_batch":
                    mean = part.shares.sum(0) / part.mask.sum() / len(flat)
                elif scope == "data_parallel":
                    mean = part.shares.sum(0) / sum(one.mask.sum() for one in among) / num_micro
                else:
                    mean = part.shares.sum(0) / tokens
                losses["balance"] = losses["balance"] + (factor(places) * mean).sum()
                if devices is not None:
                    number, per_token = devices
                    of_device = factor(places).view(number, -1).mean(1)
                    losses["device"] = losses["device"] + (of_device * mean.view(number, -1).sum(1)).sum()
                    each = [one.experts // (part.num_experts // number) for one in among]
                    sent = torch.zeros(number)
                    for one, device in zip(among, each, strict=True):
                        for d in range(number):
                            sent[d] += ((device == d).any(1) & one.mask).sum()
                    of_sent = number / (per_token * sum(one.mask.sum() for one in among)) * sent
                    losses["communication"] = losses["communication"] + (of_sent * mean.view(number, -1).sum(1)).sum()
        for name, value in losses.items():
            objective = objective + weights.get(name, 0.0) / num_layers * value
            sums[name] += float(value.detach()) / num_layers
    objective.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Found(gradients=gradients, counts=counts, **sums)
