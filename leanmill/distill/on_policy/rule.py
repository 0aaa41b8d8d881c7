"""The student's own continuations in place of the data's, for losses that a teacher gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leanmill.core.batches import Batch, BatchRule, Score
from leanmill.core.errors import ConfigError
from leanmill.core.noise import derive_seed, gumbel, uniform
from leanmill.core.rules import StepContext
from leanmill.core.technique import InstallContext
from leanmill.parallel.collectives import max_over_ranks, sum_over_ranks


@dataclass
class _Texts:
    """Rows that are being continued, on the CPU."""

    ids: Tensor
    """[R, S] int64."""
    positions: Tensor
    """[R, S] int64."""
    row_ids: Tensor
    """[R] int64."""
    begins: Tensor
    """[R] int64: tokens of the prompt."""
    ends: Tensor
    """[R] int64: one past the last token that is there; S or fewer."""
    limits: Tensor
    """[R] int64: what `ends` may come to."""


class OnPolicyRule(BatchRule):
    """Replaces the ends of some rows by what the student draws after their beginnings.

    Which rows those are, and each draw, are a hash of the run's seed, the row's number and the position, so a resumed
    run draws what the first would have, on any number of ranks. Of such a row only what was drawn has labels. The
    student draws with the weights, techniques and precision of the step, in eval mode.

    Args:
        context: Knows the seed, the tokens and which one ends a text.
        share: Of rows.
        prompt_tokens: Of a row, which stay; None takes those before its first label.
        new_tokens: Most tokens to draw; None fills the row.
        temperature: Of the draw.

    Raises:
        ConfigError: There is no seed.
    """

    name = "on_policy"

    def __init__(
        self,
        context: InstallContext,
        *,
        share: float,
        prompt_tokens: int | None,
        new_tokens: int | None,
        temperature: float,
    ) -> None:
        if context.seed is None:
            raise ConfigError("on_policy draws text and was given no seed; set `seed: 0` in the recipe")
        self._share, self._prompt, self._new, self._temperature = share, prompt_tokens, new_tokens, temperature
        self._end_of_text = context.end_of_text
        self._num_tokens = context.vocab_size if context.num_tokens is None else context.num_tokens
        self._choice, self._draws = (
            torch.tensor([derive_seed(context.seed, self.name, what)]) for what in ("rows", "tokens")
        )
        self._counted: Tensor | None = None
        """Over all ranks, in the last step: rows, rows written, tokens written."""

    def change_batches(self, batches: Sequence[Batch], context: StepContext, score: Score) -> Sequence[Batch]:
        """See `BatchRule`."""
        chosen = [self._chosen(batch) for batch in batches]
        places = [(index, row) for index, rows in enumerate(chosen) for row in rows.nonzero().flatten().tolist()]
        rows_at_once, device = len(batches[0]["row_ids"]), batches[0]["input_ids"].device
        most = int(max_over_ranks(torch.tensor(len(places))))
        changed = [self._with_mask(batch) for batch in batches]
        num_written = 0
        # Ranks run equally many forwards, also those with fewer rows: of a sharded model they are collectives.
        for start in range(0, most, rows_at_once):
            part = places[start : start + rows_at_once]
            texts = self._begin([batches[index] for index, _ in part], [row for _, row in part], batches[0])
            self._continue(texts, len(part), score, device)
            for number, (index, row) in enumerate(part):
                num_written += self._put(texts, number, changed[index], row)
        counts = torch.tensor([sum(len(rows) for rows in chosen), len(places), num_written])
        self._counted = sum_over_ranks(counts)
        return changed

    def metrics(self) -> Mapping[str, float]:
        """Return the share of the last step's rows that the student wrote, and the tokens of such a row."""
        if self._counted is None:
            return {}
        num_rows, num_written, num_tokens = self._counted.tolist()
        return {"share": num_written / num_rows, "tokens_a_row": num_tokens / max(1, num_written)}

    def _chosen(self, batch: Batch) -> Tensor:
        """Bool [B] on the CPU: the rows to write, of those that have room and, for a question, an answer."""
        row_ids = batch["row_ids"].cpu()
        is_drawn = uniform(self._choice, row_ids) < self._share
        return is_drawn & (self._begins(batch) < batch["input_ids"].shape[1])

    def _begins(self, batch: Batch) -> Tensor:
        """[B] int64 on the CPU: tokens of each row's prompt; S where there is nothing to write."""
        num_rows, length = batch["labels"].shape
        if self._prompt is not None:
            return torch.full((num_rows,), self._prompt)
        has_label = (batch["labels"] != -100).cpu()
        return torch.where(has_label.any(-1), has_label.int().argmax(-1) + 1, length)

    @staticmethod
    def _with_mask(batch: Batch) -> dict[str, Tensor]:
        """A copy to write in, with a mask, since texts may end before their rows do."""
        names = ("input_ids", "labels", "position_ids")
        mask = batch.get("token_mask")
        mask = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.clone()
        return {**batch, **{name: batch[name].clone() for name in names}, "token_mask": mask}

    def _begin(self, batches: Sequence[Batch], rows: Sequence[int], like: Batch) -> _Texts:
        """The chosen rows, and in place of those that other ranks have more, rows that are at their end."""
        num_rows, length = like["input_ids"].shape
        ids, row_ids = torch.zeros(num_rows, length, dtype=torch.int64), torch.zeros(num_rows, dtype=torch.int64)
        positions = torch.arange(length).expand(num_rows, -1).clone()
        begins = torch.ones(num_rows, dtype=torch.int64)
        for number, (batch, row) in enumerate(zip(batches, rows, strict=True)):
            begin = begins[number] = self._begins(batch)[row]
            ids[number, :begin] = batch["input_ids"][row, :begin].cpu()
            kept = batch["position_ids"][row, :begin].cpu()
            # What follows goes on with the document that the prompt ends in.
            positions[number] = torch.cat([kept, kept[-1] + 1 + torch.arange(length - int(begin))])
            row_ids[number] = batch["row_ids"][row]
        limits = torch.full_like(begins, length) if self._new is None else (begins + self._new).clamp(max=length)
        return _Texts(ids, positions, row_ids, begins, begins.clone(), limits)

    def _continue(self, texts: _Texts, num_rows: int, score: Score, device: torch.device) -> None:
        # One shape for all forwards of a run, so that nothing is compiled anew.
        width = length = texts.ids.shape[1]
        if self._prompt is not None and self._new is not None:
            width = min(length, self._prompt + self._new)
        is_going, every = torch.arange(len(texts.ids)) < num_rows, torch.arange(len(texts.ids))
        num_draws = int(max_over_ranks((texts.limits - texts.begins)[is_going].max() if num_rows else torch.tensor(0)))
        for _ in range(num_draws):
            batch = {"input_ids": texts.ids[:, :width], "position_ids": texts.positions[:, :width]}
            batch["last"] = (texts.ends - 1).clamp(max=width - 1)
            logits = score.next_logits({name: value.to(device) for name, value in batch.items()})
            token = self._drawn(logits[:, : self._num_tokens].float(), texts).cpu()
            is_going &= texts.ends < texts.limits
            texts.ids[every[is_going], texts.ends[is_going]] = token[is_going]
            texts.ends += is_going
            if self._end_of_text is not None:
                is_going &= token != self._end_of_text
            if not int(sum_over_ranks((is_going & (texts.ends < texts.limits)).sum())):
                break

    def _drawn(self, logits: Tensor, texts: _Texts) -> Tensor:
        numbers = texts.row_ids * texts.ids.shape[1] + texts.ends
        elements = (numbers[:, None] * logits.shape[1] + torch.arange(logits.shape[1])).to(logits.device)
        # The largest of logits with Gumbel noise is a draw from their softmax.
        return (logits / self._temperature + gumbel(self._draws.to(logits.device), elements)).argmax(-1)

    @staticmethod
    def _put(texts: _Texts, number: int, batch: Mapping[str, Tensor], row: int) -> int:
        """Write one text into its row; return how many tokens were drawn."""
        begin, end = int(texts.begins[number]), int(texts.ends[number])
        ids = texts.ids[number].to(batch["input_ids"].device)
        batch["input_ids"][row], batch["position_ids"][row] = ids, texts.positions[number].to(ids.device)
        batch["labels"][row] = -100
        batch["labels"][row, begin - 1 : end - 1] = ids[begin:end]
        batch["token_mask"][row] = torch.arange(len(ids), device=ids.device) < end
        return end - begin
