"""A model's own output head, for losses on other hidden states than its last; logits never exist whole."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.core.head import HeadForm, head_extras, known_head_form
from leanmill.core.head_loss import head_cross_entropy, is_plain_head, loss_of_head


class SharedHead:
    """Cross-entropy through the head of a causal LM, whatever techniques stage its weight.

    Args:
        model: Perhaps on meta.
        user: What asks, for messages: a technique or a key of it.

    Raises:
        ConfigError: The family does more to its logits than is known.
    """

    def __init__(self, model: Any, user: str) -> None:
        form = HeadForm() if not head_extras(model.config) else known_head_form(model.config)
        if form is None:
            raise ConfigError(
                f"{user} computes losses with the output head, and model type {model.config.model_type!r} changes its "
                f"logits after that; choose another family, e.g. llama, or remove {user}"
            )
        self.model, self.user, self.form = model, user, form

    @property
    def module(self) -> nn.Module:
        """The head. Asked for anew: a technique installed later may have put a site in its place."""
        return self.model.get_output_embeddings()  # type: ignore[no-any-return]

    def check(self) -> None:
        """Refuse a head that is more than a matmul, once all techniques are installed.

        Raises:
            ConfigError: An adapter hangs beside it, or its backward has another weight.
        """
        if not is_plain_head(self.module):
            raise ConfigError(
                f"{self.user} computes losses with the output head, and another technique has made that more than a "
                f"matmul; leave the head out of that technique's `targets`, or remove {self.user}"
            )

    def cross_entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of cross-entropies over labels, fp32.

        Args:
            hidden: [..., H].
            labels: [...] int64, -100 where there is none.
        """
        flat, form = labels.reshape(-1), self.form

        def loss(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return head_cross_entropy(self.module, (rows, weight, bias), flat, reduction="sum", form=form)

        return loss_of_head(self.module, hidden, loss).float()
