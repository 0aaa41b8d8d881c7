"""A model's vectors of texts drawn towards a teacher's."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.account import Account
from leanmill.core.around import Around, Call, Ring, put_around
from leanmill.core.batches import Batch
from leanmill.core.encoders import embedding_inputs
from leanmill.core.errors import ConfigError
from leanmill.core.pooling import Pooling
from leanmill.core.sites import Sites
from leanmill.core.technique import InstallContext
from leanmill.core.vocabulary import check_vocabulary


Kind = Literal["cosine", "mse"]


class EmbeddingMatch(Around):
    """Attaches the distance between the model's vectors, mapped, and the teacher's to its hidden states.

    Args:
        account: Where the loss goes, a sum over rows: of each the mean over its texts.
        pooling: The model's own.
        kind: `distance`.
        map_shape: (width of the teacher, width of the student) of a linear map, or None for no map.
        device: Of the map's weight.
    """

    technique = "embedding_distill"
    ring = Ring.TAP
    decayed = ("weight",)

    def __init__(
        self,
        account: Account,
        *,
        pooling: Pooling,
        kind: Kind,
        map_shape: tuple[int, int] | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.account, self.pooling, self.kind = account, pooling, kind
        self.weight = None if map_shape is None else nn.Parameter(torch.empty(map_shape, device=device))
        self.target: Tensor | None = None
        """The teacher's vectors [B x texts, H] of the micro-batch."""
        self.is_token: Tensor | None = None
        self.shares: Tensor | None = None
        """fp32 [B x texts]: what each text counts; those of a row sum to 1, or to 0 where the row is none."""

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        if not self.training or self.target is None:
            return output
        assert self.is_token is not None
        assert self.shares is not None
        hidden = output.last_hidden_state
        vectors = self.pooling(hidden, self.is_token)
        with torch.autocast(hidden.device.type, enabled=False):
            mapped = vectors if self.weight is None else F.linear(vectors, self.weight.float())
            loss = (distance(mapped, self.target, self.kind) * self.shares).sum()
        output["last_hidden_state"] = self.account.attach(hidden, loss)
        return output


def distance(student: Tensor, teacher: Tensor, kind: Kind) -> Tensor:
    """Return the distance of each vector [N, H], fp32 [N]: 1 - cos(s, t), or |s - t|^2 / H."""
    if kind == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
    return (student - teacher).square().mean(-1)


def text_shares(batch: Batch) -> Tensor:
    """Return what each text counts, fp32 [B x texts]; see `EmbeddingMatch.shares`."""
    is_there = (batch["text_lengths"] > 0) & (batch["labels"][:, :1] != -100)
    return (is_there / is_there.sum(1, keepdim=True).clamp(min=1)).flatten()


class _Targets:
    """Hands the match what it needs of a micro-batch, and takes it back."""

    def __init__(
        self, path: str, kind: Literal["auto", "mean", "cls"], match: EmbeddingMatch, context: InstallContext
    ) -> None:
        self._path, self._kind, self._match, self._context = path, kind, match, context
        self._teacher: Any = None
        self._pooling = Pooling()

    @torch.no_grad()
    def give(self, batch: Batch) -> None:
        if self._context.ledger.is_looking:
            return
        if self._teacher is None:
            assert self._context.pooling_of is not None
            self._pooling = self._context.pooling_of(self._path, self._kind)
            self._teacher = self._context.load_frozen_model(self._path)
        inputs, is_token = embedding_inputs(self._teacher, batch)
        match = self._match
        match.target = self._pooling(self._teacher(**inputs).last_hidden_state, is_token)
        match.is_token, match.shares = is_token, text_shares(batch)

    def take_back(self) -> None:
        self._match.target = self._match.is_token = self._match.shares = None


def match_teacher(
    sites: Sites,
    context: InstallContext,
    *,
    teacher: str,
    pooling: Literal["auto", "mean", "cls"],
    kind: Kind,
    linear_map: Literal["where_needed", "always", "never"],
    weight: float,
) -> None:
    """Stand around the model; where nothing trains, its tensors are no part of what is built.

    Raises:
        ConfigError: The teacher has another vocabulary, or other widths and there is to be no map.
    """
    if context.frozen_config is None:
        return
    config = context.frozen_config(teacher)
    check_vocabulary(context, teacher, config.vocab_size, role="teacher")
    model: Any = sites.model
    widths = (config.hidden_size, model.config.hidden_size)
    if widths[0] != widths[1] and linear_map == "never":
        raise ConfigError(
            f"embedding_distill: teacher {teacher} has vectors of {widths[0]} entries and the student of {widths[1]}, "
            f"and cutting the longer ones compares entries that mean different things; set linear_map: where_needed, "
            f"or give the student hidden_size: {widths[0]}"
        )
    has_map = linear_map == "always" or widths[0] != widths[1]
    match = EmbeddingMatch(
        context.ledger.open(context.ledger.free_name(EmbeddingMatch.technique), per="token", weight=weight),
        pooling=context.pooling,
        kind=kind,
        map_shape=widths if has_map else None,
        device=next(model.parameters()).device,
    )
    put_around(model, match)
    targets = _Targets(teacher, pooling, match, context)
    context.ledger.before_forward(targets.give)
    context.ledger.after_forward(targets.take_back)
