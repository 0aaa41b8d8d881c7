"""A Hugging Face folder of plain weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from leanmill.core.technique import ALL_TASKS, ModelTask
from leanmill.export.compare import allowed, check_same, reload, sample_logits
from leanmill.export.folded import FoldedFormat, prepare_config
from leanmill.export.formats import Checked
from leanmill.models.pretrained import quiet_transformers
from leanmill.models.sentence_transformers import pooling_of, write_layout
from leanmill.models.tasks import task_of


def is_own_family(model: Any) -> bool:
    """Whether Leanmill, and not transformers, has the code of this model's family."""
    return type(model).__module__.startswith("leanmill.")


class HfFormat(FoldedFormat):
    """Config, safetensors and tokenizer: any model, quantised weights de-quantised."""

    label: ClassVar[str] = "huggingface"
    model_tasks: ClassVar[frozenset[ModelTask]] = ALL_TASKS
    holds_own_forms: ClassVar[bool] = True

    @classmethod
    def covers(cls, model: Any) -> str | None:
        return None

    def write(self, folder: Path) -> None:
        prepare_config(self.model, self.rebuilt, folder)
        extra = {name: value.detach().clone() for beside in self.beside for name, value in beside.weights.items()}
        for beside in self.beside:
            for key, value in beside.settings.items():
                setattr(self.model.config, key, value)
        state = {**self.model.state_dict(), **extra} if extra else None
        with quiet_transformers():
            self.model.save_pretrained(folder, safe_serialization=True, state_dict=state)
        recipe, config = self.rebuilt.recipe, self.model.config
        if recipe.model.task == "embedding":
            write_layout(folder, pooling_of(recipe.model), width=config.hidden_size, longest=recipe.data.text_length)

    def check(self, folder: Path) -> Checked:
        reloaded = self.reload(folder)
        difference = check_same(sample_logits(reloaded), self.expected, "the reloaded export")
        self.check_weights(reloaded)
        return Checked(
            max_difference=difference,
            tolerance=allowed(self.expected),
            num_parameters=self.num_parameters,
            sparsity=self.sparsity,
            notes=(*self.notes, *(note for beside in self.beside for note in beside.notes), *self.loading_notes()),
        )

    def reload(self, folder: Path) -> Any:
        """Load what was written."""
        return reload(folder, task_of(self.model))

    def loading_notes(self) -> tuple[str, ...]:
        """What whoever loads the folder must know."""
        if not is_own_family(self.model):
            return ()
        family, package = self.model.config.model_type, type(self.model).__module__.rpartition(".")[0]
        return (
            f"transformers has no family {family}: load it after `import {package}.register`, or export "
            f"it with --to hf_code, which writes the Python files too",
        )
