"""What must hold between what a model is for (`model.task`) and the rest of a recipe. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from leanmill.core.technique import ModelTask
from leanmill.data.config import MaskingConfig, Task


if TYPE_CHECKING:
    from leanmill.recipe.sections import Sections


_DATA_OF: dict[ModelTask, tuple[Task, ...]] = {
    "causal_lm": ("pretrain", "sft", "preference"),
    "masked_lm": ("masked",),
}
"""Data tasks that fit a model's, the usual one first."""


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
    if task != "causal_lm":
        yield from _of_encoders(recipe)


def _of_encoders(recipe: Sections) -> Iterator[str]:
    task = recipe.model.task
    for config in recipe.techniques:
        if task not in config.model_tasks():
            name: str = config.type  # type: ignore[attr-defined]
            yield (
                f"{name} is about causal language models, and model.task={task} is an encoder; remove it, or set "
                f"model.task=causal_lm with a causal model"
            )
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
