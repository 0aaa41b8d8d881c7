"""What a model is for, and so the class of transformers that it is built and loaded as."""

from __future__ import annotations

import inspect
from typing import Any

import transformers

from leanmill.core.encoders import is_encoder
from leanmill.core.technique import ModelTask


_AUTO = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "embedding": "AutoModel",
}
_TABLES = {
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING",
    "embedding": "MODEL_MAPPING",
}


def auto_class(task: ModelTask) -> Any:
    """Return transformers' automatic class for a task."""
    return getattr(transformers, _AUTO[task])


def class_of(config_class: Any, task: ModelTask) -> Any:
    """Return the class for a task of the family with this configuration class; None where transformers has none."""
    if task == "embedding" and config_class not in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        return None  # no encoder
    return getattr(transformers, _TABLES[task]).get(config_class, None)


def options_of(hf_config: Any, task: ModelTask) -> dict[str, Any]:
    """Return what the class takes beside a configuration: a pooler that nothing calls would wait for gradients."""
    kind = class_of(type(hf_config), task) if task == "embedding" else None
    has_pooler = kind is not None and "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return {"add_pooling_layer": False} if has_pooler else {}


def task_of(model: Any) -> ModelTask:
    """Return what a model is for, by its class."""
    if not is_encoder(model):
        return "causal_lm"
    kind: Any = class_of(type(model.config), "masked_lm")
    return "masked_lm" if kind is not None and isinstance(model, kind) else "embedding"
