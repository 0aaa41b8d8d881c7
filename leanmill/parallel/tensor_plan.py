"""Which matmuls of a model the ranks of a tensor-parallel group share, and how.

transformers' families say so themselves (`base_model_tp_plan`); for the others a plan is derived from what depends on
what, see `derived_plan`. What follows is the same for all of them: the
vocabulary is shared where embedding and head are plain and it divides, and models whose heads or widths do not
divide are refused before anything is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from leanmill.core.branches import plain_modules
from leanmill.core.errors import ConfigError
from leanmill.core.names import clean_name
from leanmill.core.near import near_divisors
from leanmill.core.site import EmbeddingSite, LinearSite
from leanmill.parallel.derived_plan import Underivable, derived_pairs, in_line


Kind = Literal["rows", "columns", "table", "partial", "counts"]
"""Rows or columns of a linear layer, rows of a table, a module whose gradient ranks see parts of, or one that counts
heads of which a rank has some."""


@dataclass(frozen=True)
class Share:
    """How ranks share one module."""

    name: str
    path: str
    """Where it sits now."""
    kind: Kind
    gathers_output: bool = False
    splits_input: bool = False
    rows: tuple[tuple[int, ...], ...] | None = None
    """With rows that do not lie together, such as those of a head in fused projections: those of each rank."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Attributes of the module, and what they are on a rank."""


_STYLES: dict[str, Share] = {
    "colwise": Share("", "", "rows"),
    "colwise_gather_output": Share("", "", "rows", gathers_output=True),
    "rowwise": Share("", "", "columns"),
    "rowwise_split_input": Share("", "", "columns", splits_input=True),
    "replicated_with_grad_allreduce": Share("", "", "partial"),
}
"""transformers' names, which are those of the transposed weight. Others are for experts and rarer attentions."""
_OLDER = {"colwise_rep": "colwise_gather_output", "rowwise_rep": "rowwise_split_input"}
_HEADS = ("num_attention_heads", "num_key_value_heads")
_DROPOUT_BETWEEN = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "activation_dropout")
"""Of numbers that a rank has a part of."""
_OF_VOCABULARY = ("embedding_rowwise", "embedding_colwise")


def tensor_plan(model: nn.Module, tp: int) -> list[Share]:
    """Return the modules that `tp` ranks share, in the model's order.

    Args:
        model: The causal LM, perhaps on meta, with or without what techniques add.
        tp: Ranks of a group.

    Raises:
        ConfigError: No plan can be derived, or the family's own has parts that are not known here, or sizes do not
            divide.
    """
    _check_heads(model, tp)
    modules = dict(plain_modules(model))
    by_name = {clean_name(path): path for path in modules}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if has_own_plan(model):
        plan: Mapping[str, str] = model.tp_plan  # type: ignore[assignment]
        shares = [
            Share(name, path, style.kind, style.gathers_output, style.splits_input)
            for name, path in by_name.items()
            if (style := _style(plan, name, tp)) is not None and modules[path] not in (head, embedding)
        ]
    else:
        _check_dropout(model, tp)
        shares = list(_derived(model, by_name, tp))
    if not any(share.kind == "columns" for share in shares):
        raise ConfigError(f"layout.tp={tp}: the plan of model type {_kind_of(model)!r} names no layer here; {_REMEDY}")
    _check_dropout(model, tp)
    for share in shares:
        _check(share, modules[share.path], tp)
        _check_owner(share, model, tp)
    return [*shares, *_vocabulary(model, {id(module): path for path, module in modules.items()}, tp)]


def split_dims(model: nn.Module, tp: int) -> dict[str, int]:
    """Return the dim along which `tp` ranks split each parameter that they share, by its plain name; tied ones both.

    Raises:
        ConfigError: See `tensor_plan`.
    """
    found: dict[str, int] = {}
    for share in tensor_plan(model, tp) if tp > 1 else ():
        if share.kind in ("rows", "columns", "table") and share.rows is None:
            found[f"{share.name}.weight"] = 1 if share.kind == "columns" else 0
            if share.kind == "rows":
                found[f"{share.name}.bias"] = 0
    return found


_REMEDY = "set layout.tp=1, and engine=fsdp where a model does not fit a rank"


def has_own_plan(model: Any) -> bool:
    """Whether transformers plans more of this family than its vocabulary."""
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    return any(not style.startswith("embedding") and name != "lm_head" for name, style in plan.items())


def derived_lines(model: nn.Module, tp: int) -> list[str]:
    """Say how `tp` ranks share the blocks of a family that has no plan of its own; nothing for one that has.

    Raises:
        ConfigError: See `tensor_plan`.
    """
    if tp == 1 or has_own_plan(model):
        return []
    lines: dict[str, None] = {}
    for share in tensor_plan(model, tp):
        general = ".".join("*" if part.isdigit() else part for part in share.name.split("."))
        if share.kind == "counts":
            lines[f"{general}: {', '.join(f'{name} {count}' for name, count in share.counts.items())} on a rank"] = None
        elif share.rows is not None:
            lines[f"{general}: rows of a rank's heads, {_said(share.rows[0])} on the first; held whole"] = None
        else:
            lines[f"{general}: by {'rows' if share.kind == 'table' else share.kind}"] = None
    return list(lines)


def _said(rows: tuple[int, ...]) -> str:
    """Return runs of numbers as ranges."""
    starts = [row for row in rows if row - 1 not in rows]
    ends = [row for row in rows if row + 1 not in rows]
    runs = [f"{first}-{last}" for first, last in zip(starts, ends, strict=True)]
    return ", ".join(runs if len(runs) < 5 else [*runs[:3], "..."])


def _derived(model: nn.Module, path_of: Mapping[str, str], tp: int) -> Iterator[Share]:
    try:
        pairs = derived_pairs(model, tp)
    except Underivable as error:
        raise ConfigError(
            f"layout.tp={tp}: transformers has no plan for model type {_kind_of(model)!r}, and none can be derived: "
            f"{error}; {_REMEDY}"
        ) from error
    for pair in pairs:
        for name, rows in pair.by_rows.items():
            yield Share(name, path_of[name], "rows", rows=None if in_line(rows) else rows)
        yield Share(pair.by_columns, path_of[pair.by_columns], "columns")
        if pair.counts:
            yield Share(pair.owner, path_of[pair.owner], "counts", counts=pair.counts)


def _style(plan: Mapping[str, str], name: str, tp: int) -> Share | None:
    general = ".".join("*" if part.isdigit() else part for part in name.split("."))
    asked = plan.get(name, plan.get(general))
    if asked is None or asked in _OF_VOCABULARY:
        return None
    style = _STYLES.get(_OLDER.get(asked, asked))
    if style is None:
        raise ConfigError(f"layout.tp={tp}: {name} would be shared as {asked!r}, which is not known here; {_REMEDY}")
    return style


def _kind_of(model: Any) -> str:
    return str(model.config.model_type)


def _check_heads(model: Any, tp: int) -> None:
    config = model.config.get_text_config()
    for key in _HEADS:
        number = getattr(config, key, None)
        if isinstance(number, int) and number % tp:
            raise ConfigError(
                f"layout.tp={tp} does not divide model.config.{key}={number}; set layout.tp={near_divisors(tp, number)}"
            )


def _check_dropout(model: Any, tp: int) -> None:
    config = model.config.get_text_config()
    for key in _DROPOUT_BETWEEN:
        if getattr(config, key, 0.0):
            raise ConfigError(
                f"layout.tp={tp}: heads on different ranks would drop the same places by model.config.{key}="
                f"{getattr(config, key)}; set it to 0, or layout.tp=1"
            )


def _check(share: Share, module: nn.Module, tp: int) -> None:
    if share.kind in ("partial", "counts"):
        return
    if type(module) not in (nn.Linear, LinearSite):
        raise ConfigError(
            f"layout.tp={tp} shares linear layers, and {share.name} is a {type(module).__name__}; {_REMEDY}"
        )
    assert isinstance(module, nn.Linear)
    size = module.out_features if share.kind == "rows" else module.in_features
    if size % tp:
        side = "outputs" if share.kind == "rows" else "inputs"
        raise ConfigError(
            f"layout.tp={tp} does not divide the {size} {side} of {share.name}; set layout.tp={near_divisors(tp, size)}"
        )


def _check_owner(share: Share, model: nn.Module, tp: int) -> None:
    """Refuse a block with numbers of its own beside shared layers: one a head, say, of which a rank has some."""
    owner = share.path.rpartition(".")[0]
    own = next(iter(model.get_submodule(owner)._parameters), None)
    if share.kind not in ("partial", "counts") and own is not None:
        name = clean_name(f"{owner}.{own}")
        raise ConfigError(f"layout.tp={tp} shares {share.name}, and not {name} beside it, in no known way; {_REMEDY}")


def _vocabulary(model: Any, paths: Mapping[int, str], tp: int) -> Iterator[Share]:
    """Share head and embedding where both can be; a vocabulary that does not divide stays whole on every rank."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    head_is_plain = type(head) in (nn.Linear, LinearSite) and head.weight.shape[0] % tp == 0
    table_is_plain = type(embedding) in (nn.Embedding, EmbeddingSite) and embedding.weight.shape[0] % tp == 0
    is_tied = head is not None and head.weight is embedding.weight
    both = head_is_plain and table_is_plain
    if table_is_plain and (both or not is_tied):
        yield Share(clean_name(paths[id(embedding)]), paths[id(embedding)], "table")
    if head_is_plain and (both or not is_tied):
        yield Share(clean_name(paths[id(head)]), paths[id(head)], "rows", gathers_output=True)
