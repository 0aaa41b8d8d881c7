"""Held-out rows of each domain, with the bytes they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.data.cache import cached_folder, fingerprint, read_json, write_json
from leanmill.data.config import DataConfig
from leanmill.data.documents import DocumentReader, Documents
from leanmill.data.encoding import BadDocument, Document, Encoder, Measured
from leanmill.data.masking import Masking
from leanmill.data.packing import NONE, RowPlan
from leanmill.data.prepared import PreparedDomain
from leanmill.data.sources import IGNORED, keeps_documents_whole, make_packer, render_row
from leanmill.data.tally import NO_ANSWER
from leanmill.data.train_data import stack_rows


_VERSION = 3
"""Raise when the same documents would give other rows."""
_OVERSAMPLING = 3
"""Rows are picked evenly from this many times the text, so that one long file is not a domain."""


@dataclass(frozen=True, kw_only=True)
class EvalDomain:
    """Held-out rows of one domain. Bits per byte = (sum of nats over labels) / ln 2 / `num_bytes`."""

    name: str
    rows: dict[str, Tensor]
    """`input_ids`, `labels`, `position_ids`, each [R, S] int64, as in training; where a row is padded also
    `token_mask` [R, S] bool, false in padding."""
    num_bytes: int
    """UTF-8 bytes of the text whose tokens are labels; special tokens count as none."""
    order0_bits_per_byte: float
    """Entropy of a byte of that same text."""
    num_rows_asked: int
    """Rows that were asked for; less text may be held out."""

    def shortfall(self) -> list[str]:
        """A line where less is held out than was asked for, else none."""
        num_rows, length = self.rows["input_ids"].shape
        if num_rows >= self.num_rows_asked:
            return []
        mask = self.rows.get("token_mask")
        num_tokens = num_rows * length if mask is None else int(mask.sum())
        return [
            f"{self.name!r} has {num_tokens:,} held-out tokens and is evaluated on those, "
            f"{self.num_rows_asked * length:,} were asked for (eval.tokens_per_domain); raise validation_fraction, "
            f"name a validation_split, or add text"
        ]


def eval_domain(
    documents: Documents,
    encoder: Encoder,
    config: DataConfig,
    *,
    num_tokens: int,
    pad_id: int,
    key: str,
    root: Path,
    masking: Masking | None = None,
) -> EvalDomain | None:
    """Return about `num_tokens` held-out tokens of a domain, at least one row; the same are hidden of it every time.

    None where the recipe holds nothing out.

    Raises:
        ConfigError: The domain has no held-out text.
    """
    reader = None if isinstance(documents, PreparedDomain) else documents.validation()
    stored = documents.held_out(key) if isinstance(documents, PreparedDomain) else None
    if reader is None and stored is None:
        return None
    num_rows = max(1, num_tokens // config.sequence_length)
    packing: list[Any] = [config.task, config.sequence_length, config.document_mask, config.long_document_rule]
    if masking is not None:
        packing.append(config.masking.model_dump())
    full_key = fingerprint([_VERSION, _OVERSAMPLING, documents.name, documents.key, key, packing, num_rows])

    def build(folder: Path) -> None:
        needed = num_rows * config.sequence_length * _OVERSAMPLING
        measured, numbers = list[Measured](), list[int]()
        for one in stored or _measured(encoder, reader):
            measured.append(one)
            numbers.append(0 if reader is None else reader.tally.num_rows)
            needed -= len(one.encoded.ids)
            if needed <= 0:
                break
        if not measured:
            assert reader is not None
            raise nothing_held_out(documents, encoder, reader)

        def name(document: int) -> str:
            if reader is None:
                return f"held-out document {document + 1:,} of {documents.name!r}"
            return reader.locate(numbers[document])

        _save(folder, *_rows(measured, config, masking, name=name, num_rows=num_rows, pad_id=pad_id))

    folder = cached_folder(root, "evaluation", full_key, build)
    facts = read_json(folder / "facts.json")
    return EvalDomain(
        name=documents.name,
        rows={path.stem: torch.from_numpy(np.load(path, allow_pickle=False)) for path in sorted(folder.glob("*.npy"))},
        num_bytes=facts["num_bytes"],
        order0_bits_per_byte=facts["order0_bits_per_byte"],
        num_rows_asked=num_rows,
    )


def measure_row(encoder: Encoder, document: Document, reader: DocumentReader) -> Measured | None:
    """Encode the document that `reader` just gave; None, and counted, where nothing of it is to be predicted.

    Raises:
        ConfigError: The chat template refuses it; the message names the row.
    """
    row = reader.tally.num_rows
    try:
        measured = encoder.measure(document)
    except BadDocument as error:
        raise ConfigError(f"{reader.locate(row)}: {error}") from error
    if measured.encoded.is_target is None or measured.encoded.is_target.any():
        return measured
    reader.tally.drop(NO_ANSWER, row)
    return None


def _measured(encoder: Encoder, reader: DocumentReader | None) -> Iterator[Measured]:
    for document in reader or ():
        one = measure_row(encoder, document, reader)  # type: ignore[arg-type]
        if one is not None:
            yield one


def nothing_held_out(documents: Documents, encoder: Encoder, held_out: DocumentReader) -> ConfigError:
    """Say why; blame what is held out only where the training rows are any better."""
    train = documents.train()
    if all(measure_row(encoder, document, train) is None for document in train):
        train.tally.locate(train.locate)
        return train.tally.nothing_left(documents.name, documents.column)
    if held_out.tally.dropped:
        held_out.tally.locate(held_out.locate)
        return held_out.tally.nothing_left(f"{documents.name} (held out)", documents.column)
    return ConfigError(
        f"data.source: no text of {documents.name!r} is held out for evaluation; raise validation_fraction, "
        f"name a validation_split, or set validation_fraction: 0 to train without evaluation"
    )


def _rows(
    measured: list[Measured],
    config: DataConfig,
    masking: Masking | None,
    *,
    name: Callable[[int], str],
    num_rows: int,
    pad_id: int,
) -> tuple[dict[str, Tensor], NDArray[np.int64]]:
    """Pack documents as in training; return the rows and the counts [256] of the bytes they predict."""
    offsets = np.cumsum([0, *(len(m.encoded.ids) for m in measured)], dtype=np.int64)
    tokens = np.concatenate([m.encoded.ids for m in measured])
    masks = [m.encoded.is_target for m in measured if m.encoded.is_target is not None]
    is_target = np.concatenate(masks) if masks else None
    packer = make_packer(offsets, is_target, config, name=name, seed=0).packer
    whole = keeps_documents_whole(config)
    available = packer.rows_per_epoch if whole else -(-len(tokens) // config.sequence_length)
    chosen = np.unique(np.linspace(0, available - 1, min(num_rows, available)).astype(np.int64)).tolist()
    plans = [packer.row(number) for number in chosen]
    if not whole:
        plans = [_cut(p, len(tokens) - n * config.sequence_length) for n, p in zip(chosen, plans, strict=True)]
    rows = [render_row(plan, tokens, is_target, pad_id=pad_id) for plan in plans]
    batch = stack_rows(rows)
    sources = np.stack([plan.targets if masking is None else plan.inputs for plan in plans])
    if masking is not None:
        batch = masking.hide(batch, torch.arange(len(rows)))
    predicted = np.zeros(len(tokens), dtype=np.bool_)
    predicted[sources[batch["labels"].numpy() != IGNORED]] = True
    byte_is_predicted = np.repeat(predicted, np.concatenate([m.num_bytes for m in measured]))
    text = np.concatenate([m.text for m in measured])
    counts = np.bincount(text[byte_is_predicted], minlength=256)
    is_token = np.stack([row.is_token for row in rows])
    return batch if is_token.all() else {**batch, "token_mask": torch.from_numpy(is_token)}, counts


def _cut(plan: RowPlan, num_tokens: int) -> RowPlan:
    """Pad a row after `num_tokens`: training goes on with the next epoch there, an evaluation ends."""
    if num_tokens > len(plan.inputs):
        return plan
    inputs, targets = plan.inputs.copy(), plan.targets.copy()
    inputs[num_tokens:] = NONE
    targets[num_tokens - 1 :] = NONE
    return RowPlan(inputs, targets, plan.positions)


def _save(folder: Path, rows: Mapping[str, Tensor], byte_counts: NDArray[np.int64]) -> None:
    for name, tensor in rows.items():
        np.save(folder / f"{name}.npy", tensor.numpy())
    facts = {"num_bytes": int(byte_counts.sum()), "order0_bits_per_byte": order0_bits_per_byte(byte_counts)}
    write_json(folder / "facts.json", facts)


def order0_bits_per_byte(byte_counts: NDArray[np.int64]) -> float:
    """Entropy in bits of one byte, from the counts [256] of each."""
    counts = byte_counts[byte_counts > 0].astype(np.float64)
    share = counts / counts.sum()
    return max(0.0, -math.fsum((share * np.log2(share)).tolist()))
