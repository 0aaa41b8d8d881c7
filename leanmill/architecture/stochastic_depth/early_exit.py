"""Losses at early exits: the model's own norm and head on what a block returns."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from leanmill.core.account import Account
from leanmill.core.around import Around, Call, Ring
from leanmill.core.dataflow import final_norm
from leanmill.core.errors import ConfigError, RunError
from leanmill.core.shared_head import SharedHead


_USER = "stochastic_depth.early_exit"


class Exits:
    """What all exits of a model share: its norm and head, and the account of their losses.

    Args:
        model: A causal LM, perhaps on meta.
        account: Per token. Its value is the mean of the exits' losses, weighted by their shares.

    Raises:
        ConfigError: What follows the last block is not a norm and a head of a known form.
    """

    def __init__(self, model: Any, account: Account) -> None:
        self.head, norm = SharedHead(model, _USER), final_norm(model)
        if norm is None:
            raise ConfigError(
                f"{_USER} needs a model that goes from its last block through one norm to a head, and model type "
                f"{model.config.model_type!r} does more; choose another family, e.g. llama, or remove early_exit"
            )
        self.account, self.last_norm = account, norm
        self.labels: Tensor | None = None
        """[B, S] int64: of the micro-batch under way."""

    def check(self) -> None:
        """Refuse a head that is more than a matmul.

        Raises:
            ConfigError: An adapter hangs beside it, or its backward has another weight.
        """
        self.head.check()

    @torch.compiler.disable
    def attach(self, hidden: Tensor, share: Tensor) -> Tensor:
        """Return `hidden` [B, S, H], which brings the gradient of share x its loss from here on."""
        if self.labels is None:
            raise RunError(f"{_USER} was not told the labels of a batch")
        loss = self.head.cross_entropy(self.last_norm(hidden), self.labels)
        return self.account.attach(hidden, share * loss)


class EarlyExit(Around):
    """In training, adds the loss that the model would have if this block were its last.

    Args:
        exits: Of the model.
    """

    technique: ClassVar[str] = "stochastic_depth"
    ring: ClassVar[Ring] = Ring.TAP

    share: Tensor
    """fp32 (1,): what this exit counts among those of this step; the shares of all add up to 1."""

    def __init__(self, exits: Exits) -> None:
        super().__init__()
        self.exits = exits
        self.register_buffer("share", torch.zeros(1, device="cpu"), persistent=False)
        self.is_on = False
        """Whether there is a loss in this step. A compiled block has one graph for each value."""

    def forward(self, call: Call, /, *args: object, **kwargs: object) -> Tensor:
        """Run the block, and attach the loss of what it returns [B, S, H]."""
        output: Tensor = call(*args, **kwargs)
        return self.exits.attach(output, self.share) if self.training and self.is_on else output
