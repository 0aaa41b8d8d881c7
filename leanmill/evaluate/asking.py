"""What a model says next: forwards of whole rows, which every model answers the same with and without a cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leanmill.data.evaluation import EvalDomain
from leanmill.evaluate.models import Opened
from leanmill.parallel.build import build_engine
from leanmill.parallel.config import SingleEngine
from leanmill.parallel.launch import Ranks
from leanmill.trainer.evaluate_checkpoint import score_domains
from leanmill.trainer.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A model, and how it computes."""

    opened: Opened
    ranks: Ranks
    precision: Literal["fp32", "bf16"]
    rows_per_batch: int

    @torch.no_grad()
    def last_logits(self, rows: Sequence[Tensor], num_last: int) -> list[Tensor]:
        """Return the logits [num_last, vocab] of the last tokens of each row, fp32 on the CPU.

        Rows of one length share a forward; none is padded, so no row's answer depends on the others' lengths.

        Args:
            rows: int64 [tokens] each.
            num_last: Tokens at the end of a row, at most its length.
        """
        by_length: defaultdict[int, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            by_length[len(row)].append(index)
        found = [torch.empty(0)] * len(rows)
        device = self.ranks.device
        for indices in by_length.values():
            for start in range(0, len(indices), self.rows_per_batch):
                part = indices[start : start + self.rows_per_batch]
                batch = torch.stack([rows[index] for index in part]).to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    logits = self.opened.model(input_ids=batch, use_cache=False, logits_to_keep=num_last).logits
                for index, of_row in zip(part, logits.float().cpu(), strict=True):
                    found[index] = of_row
        return found

    def score_text(self, domains: Sequence[EvalDomain]) -> Evaluation:
        """Score held-out rows as training does."""
        engine, _ = build_engine(SingleEngine(), ranks=self.ranks, precision=self.precision, model_bytes=0)
        return score_domains(engine, self.opened.model, domains, self.rows_per_batch, self.opened.probes)
