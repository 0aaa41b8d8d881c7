"""What training rows hold, for a person: documents, what is predicted, padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from torch import Tensor

from leanmill.data.sources import IGNORED


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Neighbouring tokens of one document that are all predicted, or all not."""

    document: int
    """Within the row, from 0."""
    is_predicted: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class RowPreview:
    """One row."""

    pieces: list[Piece]
    num_documents: int
    """Of which the first may have begun in another row, and the last may end there."""
    num_tokens: int
    """Without padding."""
    num_padding: int
    num_predicted: int
    """Positions with a target; that of the last may be the first token of the next row."""

    def facts(self) -> str:
        """The counts in words."""
        documents = "1 document" if self.num_documents == 1 else f"{self.num_documents:,} documents"
        padding = f", {self.num_padding:,} of padding" if self.num_padding else ""
        return f"{documents}, {self.num_tokens:,} tokens{padding}, {self.num_predicted:,} predicted"


def preview_rows(
    rows: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerFast, *, is_masked: bool = False
) -> list[RowPreview]:
    """Return what rows hold.

    Args:
        rows: What `TrainData.next_rows` returned, [R, S] each.
        tokenizer: Turns their ids back into text.
        is_masked: Whether tokens are predicted where they are hidden, rather than from those before.
    """
    return [
        _preview({name: value[index].tolist() for name, value in rows.items()}, tokenizer, is_masked)
        for index in range(len(rows["input_ids"]))
    ]


def _preview(row: Mapping[str, list[int]], tokenizer: PreTrainedTokenizerFast, is_masked: bool) -> RowPreview:
    ids, labels, positions = row["input_ids"], row["labels"], row["position_ids"]
    num_tokens = sum(row["token_mask"]) if "token_mask" in row else len(ids)
    has_label = [label != IGNORED for label in labels]
    # A token that follows is predicted at the position before it; the first of a row, in the row before.
    predicted = has_label if is_masked else [False, *has_label[:-1]]
    document, documents = -1, list[int]()
    for index, position in enumerate(positions[:num_tokens]):
        document += position == 0 or index == 0
        documents.append(document)
    places = groupby(range(num_tokens), key=lambda index: (documents[index], predicted[index]))
    pieces = [
        Piece(
            document=number,
            is_predicted=is_predicted,
            text=str(tokenizer.decode([ids[index] for index in indices], clean_up_tokenization_spaces=False)),
        )
        for (number, is_predicted), indices in places
    ]
    return RowPreview(
        pieces=pieces,
        num_documents=document + 1,
        num_tokens=num_tokens,
        num_padding=len(ids) - num_tokens,
        num_predicted=sum(label != IGNORED for label in labels),
    )
