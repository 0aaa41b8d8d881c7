"""Losses at early exits: the model's own norm and head on what a block returns."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leanmill.core.around import Around, Call, Ring
from leanmill.core.dataflow import final_norm
from leanmill.core.errors import ConfigError, RunError
from leanmill.core.head import HeadForm, head_extras, known_head_form
from leanmill.core.head_loss import is_plain_head, loss_of_head
from leanmill.core.ledger import Account
from leanmill.kernels.linear_cross_entropy.op import linear_cross_entropy


class Exits:
    """What all exits of a model share: its norm and head, and the account of their losses.

    Args:
        model: A causal LM, perhaps on meta.
        account: Per token. Its value is the mean of the exits' losses, weighted by their shares.

    Raises:
        ConfigError: What follows the last block is not a norm and a head of a known form.
    """

    def __init__(self, model: Any, account: Account) -> None:
        form = HeadForm() if not head_extras(model.config) else known_head_form(model.config)
        norm = final_norm(model)
        if norm is None or form is None:
            raise ConfigError(
                f"stochastic_depth.early_exit needs a model that goes from its last block through one norm to a head, "
                f"and model type {model.config.model_type!r} does more; choose another family, e.g. llama, or remove "
                f"early_exit"
            )
        self.model, self.account, self.last_norm, self.form = model, account, norm, form
        self.labels: Tensor | None = None
        """[B, S] int64: of the micro-batch under way."""

    def check(self) -> None:
        """Refuse a head that is more than a matmul.

        Raises:
            ConfigError: An adapter hangs beside it, or its backward has another weight.
        """
        if not is_plain_head(self._head):
            raise ConfigError(
                "stochastic_depth.early_exit computes losses with the output head, and another technique has made that "
                "more than a matmul; leave the head out of that technique's `targets`, or remove early_exit"
            )

    @property
    def _head(self) -> nn.Module:
        # Asked for anew: a technique installed later may have put a site in its place.
        return self.model.get_output_embeddings()  # type: ignore[no-any-return]

    @torch.compiler.disable
    def attach(self, hidden: Tensor, share: Tensor) -> Tensor:
        """Return `hidden` [B, S, H], which brings the gradient of share x its loss from here on."""
        if self.labels is None:
            raise RunError("stochastic_depth.early_exit was not told the labels of a batch")
        labels = self.labels.reshape(-1)

        def cross_entropy(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            scale, cap = self.form.scale, self.form.softcap
            return linear_cross_entropy(rows, weight, labels, bias, reduction="sum", logit_scale=scale, softcap=cap)

        loss = loss_of_head(self._head, self.last_norm(hidden), cross_entropy).float()
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
