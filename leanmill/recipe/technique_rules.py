"""What must hold between techniques, optimizer and engine, by what techniques say of themselves. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from leanmill.core.parameters import PLAIN


if TYPE_CHECKING:
    from leanmill.recipe.sections import Sections


def technique_problems(recipe: Sections) -> Iterator[str]:
    """Yield what techniques cannot do under this optimizer and engine, or beside each other."""
    yield from _losses(recipe)
    yield from _rates(recipe)
    yield from _views(recipe)
    yield from _turns(recipe)
    yield from _branches(recipe)
    yield from _modules_left_out(recipe)
    yield from _references(recipe)
    yield from _experts(recipe)
    yield from _shared_work(recipe)
    yield from _own_text(recipe)
    for technique in recipe.techniques:
        yield from technique.problems_with_rows_of(recipe.data.sequence_length)


def _losses(recipe: Sections) -> Iterator[str]:
    if recipe.train.cross_entropy_weight == 0 and not recipe.techniques:
        yield "train.cross_entropy_weight=0 without techniques leaves no loss; set it to 1, or add e.g. {type: distill}"
    shares = [field for config in recipe.techniques if (field := config.shares_cross_entropy()) is not None]
    if recipe.train.cross_entropy_weight == 0 and shares:
        yield (
            f"{shares[0]} is cross-entropy with a share of train.cross_entropy_weight=0, which is nothing; remove "
            f"{shares[0]}, or set train.cross_entropy_weight above 0, e.g. 1"
        )


def _shared_work(recipe: Sections) -> Iterator[str]:
    """What has not been compared with one process where ranks share more than data."""
    layout = recipe.layout
    for config in recipe.techniques:
        name: str = config.type  # type: ignore[attr-defined]
        for key, size, holds, shared in (
            ("tp", layout.tp, config.holds_where_matmuls_are_shared, "matmuls"),
            ("cp", layout.cp, config.holds_where_rows_are_shared, "rows"),
            ("pp", layout.pp, config.holds_where_blocks_are_apart, "out blocks"),
        ):
            if size > 1 and not holds():
                yield (
                    f"{name} has not been shown to hold where ranks share {shared}; set layout.{key}=1, or remove "
                    f"{name}"
                )


def _own_text(recipe: Sections) -> Iterator[str]:
    """What does not fit text that the model writes itself."""
    names = [config.type for config in recipe.techniques if config.writes_text()]  # type: ignore[attr-defined]
    if not names:
        return
    name = names[0]
    if len(names) > 1:
        yield f"{name} is there {len(names)} times, and each would write over the other's text; keep one"
    if recipe.train.cross_entropy_weight != 0:
        yield (
            f"{name} trains on the model's own text, whose tokens are no targets; set "
            f"train.cross_entropy_weight=0, and let a teacher be the loss: {{type: distill, teacher: ...}}"
        )
    if not any(config.num_frozen_logits() for config in recipe.techniques):
        yield f"{name} writes text and no teacher looks at it; add {{type: distill, teacher: ...}}"
    for other in [config.type for config in recipe.techniques if config.knows_rows_by_number()]:  # type: ignore[attr-defined]
        yield f"{other}.cache_dir holds logits of the data's rows, and {name} writes others; remove cache_dir"
    for other in [config.type for config in recipe.techniques if config.further_tokens()]:  # type: ignore[attr-defined]
        yield f"{other} predicts further tokens of the data's text, and {name} writes other text; remove one of the two"
    if recipe.data.task == "preference":
        yield f"{name} continues texts, and data.task=preference compares answers; set data.task=sft or pretrain"


def _rates(recipe: Sections) -> Iterator[str]:
    # A step multiplies weights by 1 - lr * weight_decay.
    for technique in recipe.techniques:
        said, optimizer = technique.own_settings(), recipe.optimizer
        lr = optimizer.lr * (said.lr_factor or 1.0)
        decay = optimizer.weight_decay if said.weight_decay is None else said.weight_decay
        if said != PLAIN and lr * decay >= 1:
            kind: str = technique.type  # type: ignore[attr-defined]
            yield (
                f"{kind}: optimizer.lr={optimizer.lr:g} x lr_factor={said.lr_factor or 1.0:g} x weight_decay={decay:g} "
                f"is at least 1, so every step would wipe its parameters out; set {kind}.weight_decay below {1 / lr:g}"
            )


def _views(recipe: Sections) -> Iterator[str]:
    writing = [config.type for config in recipe.techniques if config.writes_masters()]  # type: ignore[attr-defined]
    names = [config.type for config in recipe.techniques if config.reads_optimizer_state()]  # type: ignore[attr-defined]
    if names and recipe.optimizer.type == "adamw8bit":
        yield (
            f"{names[0]} writes optimizer state element by element, and optimizer.type=adamw8bit keeps it in rounded "
            f"blocks; set optimizer.type=adamw or lion"
        )
    for config in recipe.techniques:
        remedy = config.reads_second_moments()
        if remedy is not None and recipe.optimizer.type == "lion":
            yield (
                f"{config.type} needs second moments of gradients, and optimizer.type=lion keeps none; set "  # type: ignore[attr-defined]
                f"optimizer.type=adamw, or {remedy}"
            )
    offloads = ("offload_optimizer", "offload_parameters") if recipe.engine.type == "deepspeed" else ()
    for field in offloads:
        offload = getattr(recipe.engine, field)
        if writing and offload is not None and offload.device == "nvme":
            yield (
                f"{writing[0]} reads weights and optimizer state in every step, and engine.{field}.device=nvme keeps "
                f"them on disk; set engine.{field}.device=cpu"
            )


def _turns(recipe: Sections) -> Iterator[str]:
    named = [(config.type, config) for config in recipe.techniques]  # type: ignore[attr-defined]
    for turning in [name for name, config in named if config.changes_what_trains()]:
        if recipe.engine.type == "deepspeed":
            yield (
                f"{turning} trains other parameters in some steps than in others, and DeepSpeed cuts those that train "
                f"into flat partitions once; type engine=fsdp or engine=ddp"
            )
        for name in [name for name, config in named if config.reads_optimizer_state()]:
            yield (
                f"{name} moves weights by their gradients, which {turning} lets rest in some steps; remove one of the "
                f"two from `techniques`"
            )


def _branches(recipe: Sections) -> Iterator[str]:
    names = [config.type for config in recipe.techniques if config.adds_branches()]  # type: ignore[attr-defined]
    if len(names) > 1:
        yield (
            f"{' and '.join(names)} both wrap layers with output branches, and PEFT would let the second replace the "
            f"first; keep one of them, or use `type: lora` with where: weight for the other"
        )


def _modules_left_out(recipe: Sections) -> Iterator[str]:
    if recipe.engine.type != "deepspeed" or recipe.engine.stage != 3:
        return
    for config in recipe.techniques:
        remedy = config.leaves_modules_out()
        if remedy is not None:
            yield (
                f"{config.type} leaves modules out of a step, and engine.stage=3 would give their weights the gradient "  # type: ignore[attr-defined]
                f"of the step before; set {remedy}, or engine.stage=2 or engine=fsdp"
            )


def _references(recipe: Sections) -> Iterator[str]:
    named = [(config.type, config) for config in recipe.techniques]  # type: ignore[attr-defined]
    moving = [name for name, config in named if config.changes_base()]
    for name in [name for name, config in named if config.num_compared() and not config.frozen_models() and moving]:
        yield (
            f"{name}.reference is not given, so the reference is the model without its adapters, and {moving[0]} moves "
            f"a part of the model into them at its start; set {name}.reference to the folder that training starts from"
        )


def _experts(recipe: Sections) -> Iterator[str]:
    layout = recipe.layout
    for name in [config.type for config in recipe.techniques if config.needs_whole_experts()]:  # type: ignore[attr-defined]
        if layout.ep > 1 or layout.experts.type == "fully_sharded":
            yield f"{name} needs all experts of a weight on every rank; set layout.ep=1 and layout.experts=spread"
