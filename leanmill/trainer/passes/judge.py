"""How much of the dense model's predictions a choice of levels keeps."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import ConfigError
from leanmill.core.levels import Dense, Drop
from leanmill.parallel.collectives import barrier, sum_over_ranks
from leanmill.parallel.launch import Ranks
from leanmill.trainer.passes.folder import SourceFolder
from leanmill.trainer.passes.levels import LevelStore, Unit, whole_file


class ModelJudge:
    """Judges by KL(dense || compressed) of the whole model, of which it holds one copy; see `Judge`.

    The dense model's predictions are kept as what its head sees, and made anew beside the candidate's: the logits of
    all rows would be larger than the model.

    Args:
        model: Dense, frozen, on its device, in the dtype it computes in.
        source: Its folder, from which layers get their dense weights back.
        units: What has a level.
        store: The levels.
        block_of: Index of the block of each layer.
        batches: This rank's calibration rows.
        ranks: Which process this is.
        memory: File in which the search remembers how far it is.
    """

    def __init__(
        self,
        model: Any,
        source: SourceFolder,
        units: Sequence[Unit],
        store: LevelStore,
        block_of: Mapping[str, int],
        batches: Sequence[Mapping[str, Tensor]],
        *,
        ranks: Ranks,
        memory: Path,
    ) -> None:
        self.model, self.source = model, source
        self.units, self.store, self.block_of = units, store, block_of
        self.ranks, self.memory = ranks, memory
        self._rows = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        self._rows_per_batch = len(batches[0]["input_ids"])
        self._levels: list[int | None] = [None] * len(units)
        self._hidden = self._seen_by_the_head()

    def losses(self, candidates: Sequence[Sequence[int | None]], *, num_tokens: int, draw: str) -> list[float]:
        """See `Judge`."""
        num_rows, length = self._rows["input_ids"].shape
        wanted = max(1, num_tokens // length // self.ranks.world_size)
        rows = torch.tensor(sorted(random.Random(draw).sample(range(num_rows), min(wanted, num_rows))))
        return [self._loss(candidate, rows) for candidate in candidates]

    def layer_errors(self) -> list[list[float]]:
        """See `Judge`."""
        found = []
        for unit in self.units:
            of_layers = [self.store.errors[layer] for layer in unit.layers]
            found.append([sum(errors) / len(errors) for errors in zip(*of_layers, strict=True)])
        return found

    def recall(self) -> dict[str, Any] | None:
        """See `Judge`."""
        if not self.memory.is_file():
            return None
        found: dict[str, Any] = json.loads(self.memory.read_text(encoding="utf-8"))
        return found

    def remember(self, found: dict[str, Any]) -> None:
        """See `Judge`."""
        if self.ranks.rank == 0:
            with whole_file(self.memory) as path:
                path.write_text(json.dumps(found), encoding="utf-8")
        barrier()

    @torch.no_grad()
    def _seen_by_the_head(self) -> Tensor:
        """Return what the dense model's head is called with [R, S, H], on the CPU."""
        found: list[Tensor] = []
        hook = self._head.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].cpu()))
        try:
            for start in range(0, len(self._rows["input_ids"]), self._rows_per_batch):
                self._forward(torch.arange(start, min(start + self._rows_per_batch, len(self._rows["input_ids"]))))
        finally:
            hook.remove()
        if not found:
            raise ConfigError(
                f"a search compares what a model's head sees, and {self.model.config.model_type} calls none; choose a "
                f"family whose head is a layer"
            )
        return torch.cat(found)

    @property
    def _head(self) -> nn.Module:
        head: nn.Module = self.model.get_output_embeddings()
        return head

    def _forward(self, rows: Tensor) -> Tensor:
        batch = {name: value[rows].to(self.ranks.device) for name, value in self._rows.items()}
        logits: Tensor = self.model(**batch, use_cache=False).logits
        return logits

    @torch.no_grad()
    def _loss(self, candidate: Sequence[int | None], rows: Tensor) -> float:
        self._set(candidate)
        total = torch.zeros(2, dtype=torch.float64)
        for part in rows.split(self._rows_per_batch):
            total[0] += self._divergence(part)
            total[1] += part.numel() * self._hidden.shape[1]
        nats, tokens = sum_over_ranks(total).tolist()
        return float(nats / tokens)

    def _divergence(self, rows: Tensor) -> float:
        """Sum over tokens of KL(dense || compressed)."""
        dense = self._hidden[rows].to(self.ranks.device)
        # Both go through one call of the head, and so through all that the family does to its logits.
        hook = self._head.register_forward_pre_hook(lambda module, inputs: (torch.cat([inputs[0], dense]),))
        try:
            ours, theirs = self._forward(rows).split(len(rows))
        finally:
            hook.remove()
        found = 0.0
        for one, other in zip(ours, theirs, strict=True):  # fp32 copies of all rows would be large
            log_p = other.float().log_softmax(-1)
            found += float(F.kl_div(one.float().log_softmax(-1), log_p, reduction="sum", log_target=True))
        return found

    def _set(self, candidate: Sequence[int | None]) -> None:
        """Give every unit its level; those that have it already cost nothing."""
        for index, (unit, level) in enumerate(zip(self.units, candidate, strict=True)):
            if level == self._levels[index]:
                continue
            self._levels[index] = level
            for layer in unit.layers:
                for name, parameter in self.model.get_submodule(layer).named_parameters(recurse=False):
                    self._fill(parameter, layer, name, level)

    def _fill(self, parameter: nn.Parameter, layer: str, name: str, level: int | None) -> None:
        config = Dense() if level is None else self.store.levels[level]
        if isinstance(config, Drop):
            parameter.data.zero_()
        elif level is None or isinstance(config, Dense) or name != "weight":
            key = f"{layer}.{name}"
            parameter.data.copy_(self.source.read([key])[key])
        else:
            parameter.data.copy_(self.store.read(level, self.block_of[layer], layer))


def key_of(parts: Mapping[str, Any]) -> str:
    """Return a short name for plain values, the same for equal ones."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()
