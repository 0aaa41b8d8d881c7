"""Which experts the tokens of each held-out domain go to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from leanmill.core.batches import Batch
from leanmill.core.probes import Finding, Probe
from leanmill.moe.load_statistics import silent_domains, specialisation
from leanmill.moe.moe_metrics.rule import NAME
from leanmill.moe.moe_metrics.watch import RouterWatch, Shown


class ExpertHistogram(Probe):
    """Counts the experts of each domain's tokens in every layer, and says how much domains differ.

    Args:
        watches: Of all routers.
        shown: Theirs.
    """

    name = NAME

    def __init__(self, watches: Sequence[RouterWatch], shown: Shown) -> None:
        self._watches, self._shown = watches, shown

    def begin(self, batch: Batch) -> None:
        labels = batch["labels"]
        is_token = (labels != -100).any(1, keepdim=True).expand(labels.shape)
        if "token_mask" in batch:
            is_token = is_token & batch["token_mask"]
        self._shown.mask = is_token.reshape(-1)

    @torch.no_grad()
    def take(self) -> Tensor:
        seen = [watch.seen for watch in self._watches]
        counts = torch.cat(seen)
        torch._foreach_zero_(seen)
        self._shown.mask = None
        return counts

    def find(self, counts: Mapping[str, Tensor]) -> Finding:
        sizes = [len(watch.seen) for watch in self._watches]
        tables = {name: [part.long().tolist() for part in one.split(sizes)] for name, one in counts.items()}
        silent = silent_domains(tables)
        layers = [watch.router.layer for watch in self._watches]
        found = [specialisation({name: table[index] for name, table in tables.items()}) for index in range(len(sizes))]
        known = {layer: value for layer, value in zip(layers, found, strict=True) if value is not None}
        metrics = {"specialisation": sum(known.values()) / len(known)} if known else {}
        return Finding(
            metrics=metrics | {f"specialisation/{layer}": value for layer, value in known.items()},
            table={"layers": layers, "domains": tables},
            notes=tuple(f"no held-out token of {name!r} got to an expert, so it counts nowhere" for name in silent),
        )
