"""The largest loss in a box around logits, token by token, while held-out text is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.batches import Batch
from leanmill.core.head import HeadForm, known_head_form
from leanmill.core.head_loss import head_operands, is_plain_head
from leanmill.core.probes import Finding, Probe
from leanmill.kernels.linear_cross_entropy.chunks import rows_a_chunk


class LogitSharpness(Probe):
    """Sums the sharpness of tokens that have a label.

    Args:
        model: A causal LM; its head is found when an evaluation begins, after engines have put their hooks on it.
        radius: See `sharpness`.
    """

    name = "sharpness"

    def __init__(self, model: nn.Module, radius: float) -> None:
        self._model, self._radius = model, radius
        self._labels: Tensor | None = None
        self._is_attached = False
        self._sums = torch.zeros(3, dtype=torch.float64)
        """Of sharpness, of tokens, and of forwards that showed no head of the kind that is understood."""

    def begin(self, batch: Batch) -> None:
        head: nn.Module = self._model.get_output_embeddings()  # type: ignore[operator]
        if not self._is_attached:
            head.register_forward_pre_hook(self._look)
            self._is_attached = True
        self._labels = batch["labels"].reshape(-1)
        self._sums[2] += 1

    @torch.no_grad()
    def _look(self, head: nn.Module, args: tuple[Any, ...]) -> None:
        labels, self._labels = self._labels, None
        if labels is None or not is_plain_head(head) or args[0].shape[:-1].numel() != labels.numel():
            return
        hidden, weight, bias = head_operands(head, args[0])  # type: ignore[arg-type]
        form = known_head_form(self._model.config) or HeadForm()
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        size = rows_a_chunk(hidden, weight, None, logits_alive=4)
        for rows, of_rows in zip(hidden.split(size), labels.split(size), strict=True):
            logits = _after_head(F.linear(rows, weight, bias).float(), form)
            total += sharpness(logits, of_rows, self._radius).double().sum()
        self._sums += torch.stack([total.cpu(), (labels != -100).sum().cpu(), -torch.ones(())]).double()

    def take(self) -> Tensor:
        counted, self._sums = self._sums, torch.zeros_like(self._sums)
        self._labels = None
        return counted

    def find(self, counts: Mapping[str, Tensor]) -> Finding:
        sums = {name: one.tolist() for name, one in counts.items()}
        if any(unseen for _, _, unseen in sums.values()):
            note = "sharpness could not be measured: the output head is more than one matmul, or makes few logits"
            return Finding(notes=(note,))
        total, tokens = (sum(one[index] for one in sums.values()) for index in (0, 1))
        by_domain = {name: one[0] / max(one[1], 1) for name, one in sums.items()}
        return Finding(metrics={"logits": total / max(tokens, 1)}, table=by_domain)


def sharpness(logits: Tensor, labels: Tensor, radius: float) -> Tensor:
    """Return 100 (max L(z') - L(z)) / (1 + L(z)) of tokens [N], over z' with |z' - z| <= radius (|z| + 1).

    L is cross-entropy, which grows in every logit but the label's and falls in that, so that the largest is at a corner
    of the box and needs no search.

    Args:
        logits: fp32 [N, V].
        labels: int64 [N], -100 where a token does not count: 0 there.
        radius: Above 0.
    """
    loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    reach = radius * (logits.abs() + 1)
    index = labels.clamp(min=0).unsqueeze(-1)
    moved = (logits + reach).scatter(-1, index, (logits - reach).gather(-1, index))
    largest = F.cross_entropy(moved, labels, ignore_index=-100, reduction="none")
    return 100 * (largest - loss) / (1 + loss)


def _after_head(logits: Tensor, form: HeadForm) -> Tensor:
    logits = logits * form.scale
    return logits if form.softcap is None else form.softcap * torch.tanh(logits / form.softcap)
