"""What must hold between what a model is for (`model.task`) and the rest of a recipe. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from leanmill.core.technique import ModelTask
from leanmill.data.config import HfDataset, MaskingConfig, Task, sources_of


if TYPE_CHECKING:
    from leanmill.recipe.sections import Sections


_DATA_OF: dict[ModelTask, tuple[Task, ...]] = {
    "causal_lm": ("pretrain", "sft", "preference"),
    "masked_lm": ("masked",),
    "embedding": ("sentence_pairs",),
}
"""Data tasks that fit a model's, the usual one first."""


_WORDS: dict[ModelTask, str] = {
    "causal_lm": "causal language models",
    "masked_lm": "encoders that predict hidden tokens",
    "embedding": "vectors of texts",
}


def model_task_problems(recipe: Sections) -> Iterator[str]:
    """Yield what a model of this task cannot be trained on, or with."""
    task, data = recipe.model.task, recipe.data
    if data.task not in _DATA_OF[task]:
        fitting = next(model for model, tasks in _DATA_OF.items() if data.task in tasks)
        yield (
            f"model.task={task} does not learn from data.task={data.task}; set data.task={_DATA_OF[task][0]}, or "
            f"model.task={fitting}"
        )
    if data.task != "masked" and data.masking != MaskingConfig():
        yield f"data.masking hides tokens, and data.task={data.task} predicts what is shown; remove it"
    for config in recipe.techniques:
        if task not in config.model_tasks():
            fitting = sorted(config.model_tasks())[0]
            yield (
                f"{config.type} is about {_WORDS[fitting]}, and model.task={task}; remove it, or set "  # type: ignore[attr-defined]
                f"model.task={fitting} with such a model"
            )
    if task != "causal_lm":
        yield from _of_encoders(recipe)


def _of_encoders(recipe: Sections) -> Iterator[str]:
    task = recipe.model.task
    if task == "embedding":
        yield from _of_embeddings(recipe)
    if recipe.eval.prompts:
        yield f"eval.prompts are continued, and a model of model.task={task} continues nothing; remove them"
    if recipe.train.logits_chunk_tokens != "auto":
        yield f"train.logits_chunk_tokens cuts the head of causal models, and model.task={task}; remove it"
    for index, phase in enumerate(recipe.phases):
        if phase.passes:
            yield (
                f"phases.{index}.passes look at causal models a block at a time, and model.task={task}; train with "
                f"techniques instead, e.g. {{type: nm_sparsity}} or {{type: int_quant}}"
            )


def _of_embeddings(recipe: Sections) -> Iterator[str]:
    learns = any(config.learns_embeddings() for config in recipe.techniques)
    if not learns and not recipe.phases:
        yield "model.task=embedding has no loss of its own; add {type: contrastive} or {type: embedding_distill}"
    for name in [s.name for s in sources_of(recipe.data) if isinstance(s, HfDataset) and s.streaming]:
        yield f"data.task=sentence_pairs reads pairs by number, and {name!r} is a stream; set its streaming to false"
