"""A block's output drawn towards a teacher's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.account import Account
from leanmill.core.around import Around, Call, Ring
from leanmill.core.batches import Batch
from leanmill.core.operands import recomputed
from leanmill.core.sites import Sites
from leanmill.core.taps import FrozenTaps, hidden_of
from leanmill.core.technique import InstallContext
from leanmill.core.vocabulary import check_vocabulary
from leanmill.distill.hidden.distance import Kind, distance
from leanmill.distill.layers import Layers, pairs_of


class HiddenMatch(Around):
    """Attaches the distance between one block's output, mapped, and the teacher's to that output.

    Args:
        account: Where the loss goes, a sum over tokens with a label.
        kind: See `distance`.
        map_shape: (width of the teacher, width of the student) of a linear map, or None for no map.
        device: Of the map's weight.
    """

    technique = "hidden_distill"
    ring = Ring.TAP
    decayed = ("weight",)

    def __init__(
        self, account: Account, *, kind: Kind, map_shape: tuple[int, int] | None, device: torch.device
    ) -> None:
        super().__init__()
        self.account, self.kind = account, kind
        self.weight = None if map_shape is None else nn.Parameter(torch.empty(map_shape, device=device))
        self.target: Tensor | None = None
        """The teacher's hidden states [B, S, H] of the micro-batch."""
        self.has_label: Tensor | None = None
        """Bool [B, S]."""

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        if not self.training or self.target is None:
            return output
        hidden = hidden_of(output)
        # Nothing of the distance is kept for backward but what goes in.
        loss = recomputed(self._distance, hidden, self.target, self.has_label, self.weight)
        hidden = self.account.attach(hidden, loss)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _distance(self, hidden: Tensor, target: Tensor, has_label: Tensor, weight: Tensor | None) -> Tensor:
        mapped = hidden if weight is None else F.linear(hidden, weight.to(hidden.dtype))
        return torch.where(has_label, distance(mapped, target, self.kind), 0.0).sum()


class _Targets:
    """Hands every pair what it needs of a micro-batch, and takes it back."""

    def __init__(self, taps: FrozenTaps, matches: dict[int, list[HiddenMatch]]) -> None:
        self._taps, self._matches = taps, matches
        for layer in matches:
            taps.want(layer)

    def give(self, batch: Batch) -> None:
        hidden, has_label = self._taps.read(batch).blocks, batch["labels"] != -100
        for layer, matches in self._matches.items():
            for match in matches:
                match.target, match.has_label = hidden[layer], has_label

    def take_back(self) -> None:
        for matches in self._matches.values():
            for match in matches:
                match.target = match.has_label = None


def match_layers(
    sites: Sites,
    context: InstallContext,
    *,
    teacher: str,
    layers: Layers,
    kind: Kind,
    always_maps: bool,
    weight: float,
) -> None:
    """Stand around the student's blocks of every pair; where nothing trains, only check the pairs.

    Raises:
        ConfigError: A layer is out of range, or the teacher has another vocabulary.
    """
    blocks = sites.modules("block")
    if context.frozen_config is None:
        pairs_of(layers, len(blocks), None, teacher, technique=HiddenMatch.technique)
        return
    config = context.frozen_config(teacher).get_text_config()
    check_vocabulary(context, teacher, config.vocab_size, role="teacher")
    pairs = pairs_of(layers, len(blocks), config.num_hidden_layers, teacher, technique=HiddenMatch.technique)
    width: int = sites.model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator, assignment]
    has_map = always_maps or width != config.hidden_size
    name = context.ledger.free_name(HiddenMatch.technique)
    matches: dict[int, list[HiddenMatch]] = {}
    for mine, its in pairs:
        block = blocks[mine]
        account = context.ledger.open(f"{name}/{mine}-{its}", per="token", weight=weight / len(pairs))
        match = HiddenMatch(
            account,
            kind=kind,
            map_shape=(config.hidden_size, width) if has_map else None,
            device=next(block.module.parameters()).device,
        )
        block.around(match)
        matches.setdefault(its, []).append(match)
    targets = _Targets(context.taps(teacher), matches)
    context.ledger.before_forward(targets.give)
    context.ledger.after_forward(targets.take_back)
