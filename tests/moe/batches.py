"""Micro-batches with unequal numbers of labels, padded or not, and steps of what an engine does with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leanmill.core.rules import StepContext, StepRule
from leanmill.moe.loads.loads import Loads
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import VOCAB_SIZE


ROWS, LENGTH = 3, 11


def batch_of(seed: int, *, padded: bool = False, rows: int = ROWS, length: int = LENGTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(VOCAB_SIZE, (rows, length), generator=generator)
    labels[0, : seed % 7 + 2] = -100
    batch = {
        "input_ids": torch.randint(VOCAB_SIZE, (rows, length), generator=generator),
        "labels": labels,
        "position_ids": torch.arange(length).expand(rows, -1).contiguous(),
    }
    if padded:
        num_tokens = length - torch.arange(rows) * (seed % 3 + 1)
        batch["token_mask"] = torch.arange(length) < num_tokens.unsqueeze(1)
        labels[~batch["token_mask"]] = -100
    return batch


def joined(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All rows as one micro-batch."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def num_valid(batches: Sequence[dict[str, Tensor]]) -> Tensor:
    return torch.stack([(batch["labels"] != -100).sum() for batch in batches]).sum().float()


def counts_of(loads: Loads) -> Tensor:
    """How often each expert was chosen in the last step, one layer after another."""
    assert loads.last_step is not None
    return torch.cat([loads.part(loads.last_step, layer.counts) for layer in loads.layers])


def step(
    module: TrainModule,
    rules: Sequence[StepRule],
    batches: Sequence[dict[str, Tensor]],
    *,
    everyone: Sequence[dict[str, Tensor]] | None = None,
    num_ranks: int = 1,
    is_reported: bool = True,
) -> None:
    """What an engine does whose reductions average, up to complete gradients.

    Args:
        module: The train module.
        rules: Its rules.
        batches: Micro-batches of this rank.
        everyone: Those of all ranks.
        num_ranks: Of all.
        is_reported: See `StepContext`.
    """
    scale = num_ranks / num_valid(everyone or batches)
    told = StepContext(step=0, num_steps=1, num_micro_batches=len(batches), is_reported=is_reported)
    for rule in rules:
        rule.begin_step(told)
    module.ledger.begin_step(token_scale=scale, num_micro_batches=len(batches))
    module.ledger.see_step(batches, module)
    for batch in batches:
        (module(batch)["total"] * scale).backward()
    for rule in rules:
        rule.before_optimizer(told)
