"""A Hugging Face folder that brings the modelling code of a family which only Leanmill has."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from leanmill.core.around import own_form
from leanmill.export.hf import HfFormat, is_own_family
from leanmill.models.pretrained import quiet_transformers


class HfCodeFormat(HfFormat):
    """`hf` with the family's own Python files, for machines without Leanmill: loads with `trust_remote_code=True`."""

    label: ClassVar[str] = "huggingface with code"

    @classmethod
    def covers(cls, model: Any) -> str | None:
        own, form = is_own_family(model), own_form(model)
        if own and form is not None:
            return (
                f"a folder brings the Python files of one family, and what stands beside {model.config.model_type} is "
                f"another of Leanmill's own; type --to hf"
            )
        if own or form is not None:
            return None
        return f"transformers has {model.config.model_type} built in and needs no code beside it; type --to hf"

    def write(self, folder: Path) -> None:
        with _travelling(self.model):
            super().write(folder)

    def reload(self, folder: Path) -> Any:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with quiet_transformers():
            kind = _class_in(folder, settings["auto_map"]["AutoModelForCausalLM"])
            return kind.from_pretrained(str(folder), use_safetensors=True, dtype=torch.float32).eval()

    def loading_notes(self) -> tuple[str, ...]:
        return ("loads without Leanmill, by the Python files in it, with trust_remote_code=True",)


def _class_in(folder: Path, name: str) -> Any:
    # transformers itself would take the family that this process has registered.
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        return get_class_from_dynamic_module(name, str(folder))
    except ModuleNotFoundError:
        # Import goes by the time at which a folder last changed, and misses what was put there within one tick of it.
        importlib.invalidate_caches()
        return get_class_from_dynamic_module(name, str(folder))


@contextmanager
def _travelling(model: Any) -> Iterator[None]:
    """Let transformers copy the files of the model's and its configuration's class into what it saves."""
    classes = {type(model.config): "AutoConfig", type(model): "AutoModelForCausalLM"}
    for kind, auto in classes.items():
        kind._auto_class = auto
    try:
        yield
    finally:
        for kind in classes:
            del kind._auto_class
        model.config.__dict__.pop("auto_map", None)
