"""What a model is for, and so the class of transformers that it is built and loaded as."""

from __future__ import annotations

from typing import Any

from leanmill.core.encoders import is_encoder
from leanmill.core.technique import ModelTask


def auto_class(task: ModelTask) -> Any:
    """Return transformers' automatic class for a task."""
    import transformers

    return {"causal_lm": transformers.AutoModelForCausalLM, "masked_lm": transformers.AutoModelForMaskedLM}[task]


def class_mapping(task: ModelTask) -> Any:
    """Return transformers' table of the classes for a task, by configuration class."""
    import transformers

    name = {"causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING", "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING"}[task]
    return getattr(transformers, name)


def task_of(model: Any) -> ModelTask:
    """Return what a model is for, by its class."""
    return "masked_lm" if is_encoder(model) else "causal_lm"
