"""Scoring prepared documents by what a teacher finds easier than a reference: MiniPLM's difference sampling.

Gu et al. 2024, "MiniPLM: Knowledge Distillation for Pre-Training Language Models" (arXiv:2410.17215): a
document's score is (log p_teacher - log p_reference) / tokens predicted. Theirs are pieces of 1,024 tokens, of which a
share is kept; ours are documents of any length, of whose tokens a share is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from leanmill.checkpoint.fingerprint import fingerprint_folder
from leanmill.core.errors import ConfigError, RunError
from leanmill.core.paths import expand_user
from leanmill.data.agreement import on_every_rank
from leanmill.data.cache import read_json
from leanmill.data.config import DataConfig, Prepared
from leanmill.data.prepared import PreparedDomain, open_prepared
from leanmill.data.selection import SCORES, score_file
from leanmill.data.shard_writer import sync, write_whole
from leanmill.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from leanmill.evaluate.models import Opened, open_for_evaluation


_LOGITS_PER_BATCH = 1 << 27
"""Logits of a batch: 512 MiB in fp32."""


@dataclass(frozen=True)
class Scored:
    """What this process did."""

    num_documents: int
    num_shards: int
    num_kept: int
    """Shards that had scores already."""


def score_documents(
    config: DataConfig,
    out: Path,
    *,
    teacher: Path,
    reference: Path,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    tell: Callable[[str], None] = print,
) -> Scored:
    """Write the score of every training document of a prepared folder; shards that have theirs are kept.

    Ranks share the shards and wait for each other at the start alone.

    Args:
        config: The `data` section; its source is prepared. Long documents are read `sequence_length` tokens at a time.
        out: A new folder, or one of the same data and models.
        teacher: A Hugging Face folder, safetensors.
        reference: Another one, trained on a sample of the text; both have the tokenizer of the prepared data.
        device: Where the models run.
        rank: This process.
        world_size: How many share the shards.
        tell: Called with a line at the end of every shard.

    Raises:
        ConfigError: The data is not prepared text, a model has another tokenizer, or `out` is of something else.
        RunError: A model gives no number.
    """
    domains = prepared_domains(config)
    paths = {"teacher": teacher, "reference": reference}
    check_models(config, paths)
    models = {name: open_for_evaluation(path, device) for name, path in paths.items()}
    of_models = {name: fingerprint_folder(path) for name, path in paths.items()}
    facts = {"tokenizer": domains[0].tokenizer_key, "sequence_length": config.sequence_length, **of_models}
    begin_together(out, {**facts, "domains": [facts_of(domain, index) for index, domain in enumerate(domains)]}, rank)
    work = [(domain, index, shard) for index, domain in enumerate(domains) for shard in range(domain.num_shards)]
    mine, num_documents, num_kept = work[rank::world_size], 0, 0
    for domain, index, shard in mine:
        path = out / f"domain-{index}" / score_file(shard)
        if path.is_file():
            num_kept += 1
            continue
        scores = _scores(domain.shard_documents(shard), models["teacher"], models["reference"], config.sequence_length)
        if not np.isfinite(scores[~np.isnan(scores)]).all() or np.isnan(scores).all():
            raise RunError(f"shard {shard} of {domain.name!r} has no finite scores; check the weights of both models")
        _save(path, scores)
        num_documents += len(scores)
        tell(f"{domain.name}: shard {shard + 1:,} of {domain.num_shards:,}, mean score {np.nanmean(scores):+.4f} nats")
    return Scored(num_documents, len(mine), num_kept)


def document_losses(model: Any, documents: Sequence[NDArray[Any]], sequence_length: int) -> NDArray[np.float64]:
    """Return the mean cross-entropy of each document's tokens but the first, nats [D]; NaN with fewer than two.

    Args:
        model: Causal LM in eval mode.
        documents: Token ids, each [n].
        sequence_length: Most tokens that a prediction sees; a longer document is read in pieces, side by side.
    """
    sums, counts = np.zeros(len(documents)), np.asarray([max(len(one) - 1, 0) for one in documents])
    device = next(model.parameters()).device
    for numbers, inputs, targets in _batches(documents, sequence_length, int(model.config.vocab_size)):
        with torch.no_grad():
            # Padding stands behind the text, where no causal model sees it.
            logits = model(input_ids=inputs.to(device), use_cache=False).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), targets.to(device), ignore_index=-100, reduction="none")
        sums += np.bincount(numbers, losses.double().sum(1).cpu().numpy(), minlength=len(sums))
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _scores(documents: list[NDArray[Any]], teacher: Opened, reference: Opened, length: int) -> NDArray[np.float64]:
    return document_losses(reference.model, documents, length) - document_losses(teacher.model, documents, length)


def _batches(
    documents: Sequence[NDArray[Any]], sequence_length: int, vocab_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield (number of the document of each row, inputs [R, S], targets [R, S]); pieces of like length go together."""
    pieces = [
        (number, document[start : start + sequence_length + 1].astype(np.int64))
        for number, document in enumerate(documents)
        for start in range(0, len(document) - 1, sequence_length)
    ]
    pieces.sort(key=lambda piece: -len(piece[1]))
    first = 0
    while first < len(pieces):
        width = len(pieces[first][1]) - 1
        batch = pieces[first : first + max(1, _LOGITS_PER_BATCH // (vocab_size * width))]
        first += len(batch)
        inputs = torch.zeros(len(batch), width, dtype=torch.int64)
        targets = torch.full((len(batch), width), -100)
        for row, (_, ids) in enumerate(batch):
            inputs[row, : len(ids) - 1] = torch.from_numpy(ids[:-1])
            targets[row, : len(ids) - 1] = torch.from_numpy(ids[1:])
        yield [number for number, _ in batch], inputs, targets


def prepared_domains(config: DataConfig, *, tasks: Sequence[str] = ("pretrain",)) -> list[PreparedDomain]:
    """Return the domains of prepared data, whatever scores it is to be read by.

    Raises:
        ConfigError: It is not prepared, or for another task than `tasks`.
    """
    if not isinstance(config.source, Prepared) or config.task not in tasks:
        raise ConfigError(
            f"data score reads prepared text; give a recipe with data.task: {' or '.join(tasks)} and data.source: "
            f"{{type: prepared, path: DIR}}, where DIR is of `leanmill data prepare`"
        )
    return open_prepared(config.source.model_copy(update={"scores": None, "kept_share": None}), config)


def check_models(config: DataConfig, models: Mapping[str, Path], *, tasks: Sequence[str] = ("pretrain",)) -> None:
    """Refuse models that cannot score prepared data, without reading their weights.

    Args:
        config: See `score_documents`.
        models: Their folders, by what a person calls them.
        tasks: That the data may be prepared for.

    Raises:
        ConfigError: The data is not prepared text, or a model has another tokenizer or too few positions.
    """
    key, length = prepared_domains(config, tasks=tasks)[0].tokenizer_key, config.sequence_length
    for name, path in models.items():
        if tokenizer_fingerprint(load_tokenizer(str(path))) != key:
            raise ConfigError(
                f"{name} {path} has another tokenizer than the prepared data; prepare the text with "
                f"data.tokenizer.path={path} (scores serve the same text under any tokenizer)"
            )
        longest = read_json(path / "config.json").get("max_position_embeddings")
        if longest is not None and longest < length:
            raise ConfigError(f"{name} {path} has {longest} positions; type data.sequence_length={longest} or less")


def facts_of(domain: PreparedDomain, index: int) -> dict[str, Any]:
    """Return what scores of a domain are of, by which another one is refused."""
    return {
        "name": domain.name, "text": domain.text, "num_shards": domain.num_shards,
        "folder": f"domain-{index}", "prepared": domain.key,
    }  # fmt: skip


def begin_together(out: Path, facts: dict[str, Any], rank: int) -> None:
    """Begin a folder of scores, or go on with one of the same facts; every rank must call it.

    The first rank goes first: another one would take a folder that is just being made for somebody else's.

    Raises:
        ConfigError: It is of something else; on all ranks.
    """
    for is_turn in (rank == 0, rank > 0):
        on_every_rank(partial(_begin, out, facts) if is_turn else lambda: None)


def _begin(out: Path, facts: dict[str, Any]) -> None:
    path = out / SCORES
    if path.is_file() and read_json(path) != facts:
        raise ConfigError(f"{out} has scores of other data, models or data.sequence_length; name a new folder")
    if not path.is_file() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and holds no scores; name a new folder")
    for one in facts["domains"]:
        (out / one["folder"]).mkdir(parents=True, exist_ok=True)
    write_whole(path, facts)


def _save(path: Path, scores: NDArray[np.float64]) -> None:
    """Write an array to a file that is there whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}.part")
    with temporary.open("wb") as file:
        np.save(file, scores)
    sync(temporary)
    os.replace(temporary, path)


def model_folder(path: str, key: str) -> Path:
    """Return the folder of a model that a person named as `key`.

    Raises:
        ConfigError: There is no model.
    """
    folder = expand_user(path)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{key} {path} is no Hugging Face folder; download the model, or write one with "
            f"`leanmill export --checkpoint RUN_DIR --to hf --out FOLDER`"
        )
    return folder
