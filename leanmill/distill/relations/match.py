"""Projections of attention whose relations between tokens are drawn towards a teacher's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanmill.core.account import Account
from leanmill.core.around import Around, Call, Ring, arounds, put_around
from leanmill.core.batches import Batch
from leanmill.core.branches import BASE, branched_layers
from leanmill.core.errors import ConfigError
from leanmill.core.operands import recomputed
from leanmill.core.rules import StepRule
from leanmill.core.sites import Sites
from leanmill.core.taps import FrozenTaps, projection_of
from leanmill.core.technique import InstallContext
from leanmill.core.vocabulary import check_vocabulary
from leanmill.distill.layers import Layers, pairs_of
from leanmill.distill.relations.relation import documents_of, relation_divergence


Relation = Literal["queries", "keys", "values"]
PROJECTIONS: dict[Relation, str] = {"queries": "q_proj", "keys": "k_proj", "values": "v_proj"}
"""What transformers calls them, in every family that has them apart."""
_TOKENS_AT_ONCE = 256
"""Tokens whose relations [B, heads, tokens, S] exist at once."""


class RelationMatch(Around):
    """Attaches the divergence between one projection's relations and the teacher's to its output.

    What it compares with stays as it is from forward to backward, for it runs again in recomputation.

    Args:
        account: Where the loss goes, a sum over tokens with a label.
        num_heads: Relation heads.
    """

    technique = "relation_distill"
    ring = Ring.TAP

    def __init__(self, account: Account, num_heads: int) -> None:
        super().__init__()
        self.account, self.num_heads = account, num_heads
        self.target: Tensor | None = None
        """The teacher's projections [B, S, W] of the micro-batch."""
        self.documents: Tensor | None = None
        self.has_label: Tensor | None = None

    def forward(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        output: Tensor = call(*args, **kwargs)
        if not self.training or self.target is None:
            return output
        if output.shape[:2] != self.target.shape[:2]:
            raise ConfigError(
                "relation_distill relates all tokens of a row, and another technique leaves some out of a block that "
                "it taps; remove one of them, or name other layers"
            )
        loss = output.new_zeros((), dtype=torch.float32)
        for first in range(0, output.shape[1], _TOKENS_AT_ONCE):
            last = min(first + _TOKENS_AT_ONCE, output.shape[1])
            # Nothing of the relations is kept for backward but what goes in.
            loss = loss + recomputed(self._divergence(first, last), output, self.target, self.documents, self.has_label)
        return self.account.attach(output, loss)

    def _divergence(self, first: int, last: int) -> Any:
        def divergence(output: Tensor, target: Tensor, documents: Tensor, has_label: Tensor) -> Tensor:
            each = relation_divergence(output, target, documents, self.num_heads, first, last)
            return torch.where(has_label[:, first:last], each, 0.0).sum()

        return divergence


class _Targets:
    """Hands every projection what it needs of a micro-batch."""

    def __init__(self, taps: FrozenTaps, matches: Sequence[tuple[int, str, RelationMatch]]) -> None:
        self._taps, self._matches = taps, matches
        for layer, name, _ in matches:
            taps.want_projection(layer, name)

    def give(self, batch: Batch) -> None:
        projections = self._taps.read(batch).projections
        documents, has_label = documents_of(batch["position_ids"]), batch["labels"] != -100
        for layer, name, match in self._matches:
            match.target, match.documents, match.has_label = projections[layer, name], documents, has_label


class _NoBranches(StepRule):
    """Refuses adapters beside a tapped projection: what attention uses would not be what is matched."""

    name = RelationMatch.technique

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def check(self) -> None:
        """See `StepRule`."""
        for path, layer in branched_layers(self._model):
            if any(isinstance(around, RelationMatch) for around in arounds(getattr(layer, BASE))):
                raise ConfigError(
                    f"relation_distill matches what {path} puts out, and another technique adds a branch beside it; "
                    f"leave that layer out of its `targets`, or put the delta into the weight (lora without branches)"
                )


def match_relations(
    sites: Sites,
    context: InstallContext,
    *,
    teacher: str,
    layers: Layers,
    relations: Sequence[Relation],
    num_heads: int | None,
    weight: float,
) -> StepRule | None:
    """Stand around projections of the student's blocks of every pair; where nothing trains, only check the pairs.

    Raises:
        ConfigError: A layer is out of range, a family has no such projections, heads do not divide them, or the
            teacher has another vocabulary.
    """
    model, num_blocks = sites.model, len(sites.modules("block"))
    technique = RelationMatch.technique
    if context.frozen_config is None:
        pairs_of(layers, num_blocks, None, teacher, technique=technique)
        return None
    config = context.frozen_config(teacher).get_text_config()
    check_vocabulary(context, teacher, config.vocab_size, role="teacher")
    pairs = pairs_of(layers, num_blocks, config.num_hidden_layers, teacher, technique=technique)
    name = context.ledger.free_name(technique)
    matches: list[tuple[int, str, RelationMatch]] = []
    for mine, its in pairs:
        for relation in relations:
            projection = projection_of(model, mine, PROJECTIONS[relation])
            heads = _num_heads(projection.out_features, _width(config, relation), config.num_attention_heads, num_heads)  # type: ignore[arg-type]
            account = context.ledger.open(f"{name}/{mine}-{its}-{relation}", per="token", weight=weight / len(pairs))
            match = RelationMatch(account, heads)
            put_around(projection, match)
            matches.append((its, PROJECTIONS[relation], match))
    context.ledger.before_forward(_Targets(context.taps(teacher), matches).give)
    return _NoBranches(model)


def _width(config: Any, relation: Relation) -> int:
    """Entries of a projection by a transformers configuration."""
    heads: int = config.num_attention_heads
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads: int = getattr(config, "num_key_value_heads", None) or heads
    return head_dim * (heads if relation == "queries" else key_heads)


def _num_heads(student: int, teacher: int, most: int, wanted: int | None) -> int:
    shared = math.gcd(student, teacher)
    if wanted is None:
        return max(heads for heads in range(1, most + 1) if shared % heads == 0)
    if shared % wanted:
        fitting = ", ".join(str(heads) for heads in range(1, shared + 1) if shared % heads == 0)
        raise ConfigError(
            f"relation_distill.num_relation_heads {wanted} does not divide projections of {student} entries in the "
            f"student and {teacher} in the teacher; set one of {fitting}, or leave it out"
        )
    return wanted
