"""What stands around a decoder block that runs for a share of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.core.account import Account
from leanmill.core.around import Around, Call, Ring
from leanmill.core.batches import Batch
from leanmill.core.errors import RunError
from leanmill.moe.mixture_of_depths.capacity import num_chosen
from leanmill.moe.mixture_of_depths.choice import Choice, choose, cut_arguments, size_for, take
from leanmill.moe.mixture_of_depths.router import DepthRouter, Scores


class RoutedBlock(Around):
    """Runs the block for the chosen tokens of each row alone: they attend to each other, at their own positions.

    With f what the block adds to a token x and w the router's weight, a chosen token becomes x + w f(x). Any other
    stays x under `softmax`, and becomes w x under `tanh` (symmetric reweighting).

    Args:
        router: Scores tokens.
        owns_router: Whether the router's weights are this module's, or shared and held elsewhere.
        argument_names: Of what the block may be given by position after its hidden states.
        capacity: Share of a row's tokens.
        account: Of the router's cross-entropy against the choice; None has none.
        protects_labels: Whether every token with a label is chosen in training.
        inference: How tokens are chosen in eval mode.
    """

    technique = "mixture_of_depths"
    ring = Ring.SKIP

    def __init__(
        self,
        router: DepthRouter,
        *,
        owns_router: bool,
        argument_names: Sequence[str],
        capacity: float,
        account: Account | None,
        protects_labels: bool,
        inference: Literal["router", "top_k"],
    ) -> None:
        super().__init__()
        if owns_router:
            self.router = router
        else:
            self.__dict__["router"] = router
        self.owns_router, self.argument_names = owns_router, tuple(argument_names)
        self.capacity, self.account, self.inference = capacity, account, inference
        self.protects_labels = protects_labels
        self.protected: Tensor | None = None
        """[B, S] bool: tokens of the micro-batch under way that are chosen in any case."""
        self.num_computed = 0
        """Tokens of a row to compute for, with the protected ones."""
        self.padding: Tensor | None = None
        """[B, S] bool: what of it is chosen last; None where it has no padding."""

    def reset_parameters(self) -> None:
        if self.owns_router:
            self.router.reset_parameters()

    def forward(self, call: Call, /, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Run the block for some of the tokens `hidden` [B, S, H]."""
        scores = self.router(hidden)
        choice = self._choose(scores)
        index = choice.places.unsqueeze(-1)
        before = take(hidden, choice.places)
        arguments = dict(zip(self.argument_names, args, strict=False)) | kwargs
        after: Tensor = call(before, **cut_arguments(arguments, choice))
        weight = scores.weight.unsqueeze(-1)
        is_symmetric = self.router.weighing == "tanh"
        passed = (hidden * weight).to(hidden.dtype) if is_symmetric else hidden
        # In the weight's precision: a bf16 block that adds little would lose it in the difference.
        changed = (before + weight.gather(1, index) * (after - before)).to(hidden.dtype)
        if choice.is_chosen is not None:
            changed = torch.where(choice.is_chosen.unsqueeze(-1), changed, take(passed, choice.places))
        output = passed.scatter(1, index.expand_as(changed), changed)
        return output if self.account is None else self.account.attach(output, _router_loss(scores.logits, choice))

    def _choose(self, scores: Scores) -> Choice:
        priority, num_tokens = scores.priority, scores.priority.shape[1]
        if self.training and self.padding is not None:
            priority = priority.masked_fill(self.padding, -torch.inf)
        if not self.training and self.inference == "router":
            counts = (priority >= 0).sum(-1)
            return choose(priority, size_for(_largest(counts), num_tokens), counts)
        if not (self.training and self.protects_labels):
            return choose(priority, num_chosen(num_tokens, self.capacity))
        if self.protected is None:
            raise RunError("mixture_of_depths protects labels, and was not told those of a batch")
        priority = priority.masked_fill(self.protected, torch.inf)
        return choose(priority, self.num_computed, counts_with(self.protected, self.padding, self.capacity))

    def fold(self, module: Any) -> None:
        """Refuse: no plain block passes tokens by.

        Raises:
            ConfigError: Always.
        """
        from leanmill.core.errors import ConfigError

        raise ConfigError(
            "mixture_of_depths leaves tokens out of blocks, which no plain transformers model does; keep the "
            "checkpoint, which `leanmill eval` and further training read"
        )


@torch.compiler.disable
def _largest(counts: Tensor) -> int:
    return int(counts.max())


def counts_with(protected: Tensor, padding: Tensor | None, capacity: float) -> Tensor:
    """Return how many tokens each row [B, S] chooses, [B]: the protected ones, and `capacity` of the others."""
    num_protected = protected.sum(-1)
    others = (~protected if padding is None else ~(protected | padding)).sum(-1)
    return num_protected + (others * capacity - 1e-6).ceil().long().clamp(min=0)


def see(blocks: Sequence[RoutedBlock], batch: Batch) -> None:
    """Tell the blocks of the next forward's padding and labels; where labels protect, one number is read of them."""
    mask = batch.get("token_mask")
    padding, sizes = None if mask is None else ~mask.bool(), dict[float, int]()
    protected = batch["labels"] != -100
    for block in blocks:
        block.padding = padding
        if block.protects_labels:
            if block.capacity not in sizes:
                most = int(counts_with(protected, padding, block.capacity).max())
                sizes[block.capacity] = size_for(most, protected.shape[-1])
            block.protected, block.num_computed = protected, sizes[block.capacity]


def _router_loss(logits: Tensor, choice: Choice) -> Tensor:
    """Mean cross-entropy of logits [B, S, 2] against whether a token was chosen."""
    chosen = torch.ones_like(choice.places) if choice.is_chosen is None else choice.is_chosen.long()
    targets = torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device).scatter(1, choice.places, chosen)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
