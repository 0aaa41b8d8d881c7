"""Tokens hidden from an encoder, drawn from the seed, the number of a row and a place in it: nothing else counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leanmill.core.noise import derive_seed, uniform
from leanmill.data.config import DataConfig
from leanmill.data.sources import IGNORED


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Masking:
    """Hides tokens of rows (Devlin et al. 2018, arXiv:1810.04805, section 3.1)."""

    share: float
    """Of tokens, what is predicted."""
    as_mask: float
    """Of those, what the mask token takes the place of."""
    as_random: float
    """Of those, what a random token takes the place of."""
    mask_id: int
    vocab_size: int
    special: Tensor
    """[K] int64, tokens that are never predicted."""
    seed: int

    def hide(self, rows: Mapping[str, Tensor], row_ids: Tensor) -> dict[str, Tensor]:
        """Return rows with some tokens hidden and those as their labels.

        Args:
            rows: `input_ids` [R, S] int64 and what else there is of them.
            row_ids: [R] int64, numbers of the rows: equal ones hide the same places.

        Returns:
            The rows with other `input_ids`, and `labels` [R, S]: a token where it is to be predicted, -100 elsewhere.
        """
        ids = rows["input_ids"]
        places = row_ids[:, None] * ids.shape[1] + torch.arange(ids.shape[1])
        is_hidden = (self._drawn("which", places) < self.share) & ~torch.isin(ids, self.special)
        kind = self._drawn("kind", places)
        other = (self._drawn("token", places).double() * self.vocab_size).long()
        shown = torch.where(kind < self.as_mask + self.as_random, other, ids)
        shown = shown.masked_fill(kind < self.as_mask, self.mask_id)
        labels = ids.masked_fill(~is_hidden, IGNORED)
        return {**rows, "input_ids": torch.where(is_hidden, shown, ids), "labels": labels}

    def _drawn(self, what: str, places: Tensor) -> Tensor:
        return uniform(torch.tensor([derive_seed(self.seed, "masking", what)]), places)


def masking_of(config: DataConfig, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Masking | None:
    """Return what hides tokens of the rows of a `data` section; None where its task hides none."""
    if config.task != "masked":
        return None
    return Masking(
        share=config.masking.share,
        as_mask=config.masking.as_mask,
        as_random=config.masking.as_random,
        mask_id=int(tokenizer.mask_token_id),
        vocab_size=len(tokenizer),
        special=torch.tensor(sorted(tokenizer.all_special_ids)),
        seed=seed,
    )
