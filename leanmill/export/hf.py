"""A Hugging Face folder of plain weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from leanmill.export.compare import allowed, check_same, reload, sample_logits
from leanmill.export.folded import FoldedFormat, prepare_config
from leanmill.export.formats import Checked
from leanmill.models.pretrained import quiet_transformers


class HfFormat(FoldedFormat):
    """Config, safetensors and tokenizer: any model, quantised weights de-quantised."""

    label: ClassVar[str] = "huggingface"

    @classmethod
    def covers(cls, model: Any) -> str | None:
        return None

    def write(self, folder: Path) -> None:
        prepare_config(self.model, self.rebuilt, folder)
        with quiet_transformers():
            self.model.save_pretrained(folder, safe_serialization=True)

    def check(self, folder: Path) -> Checked:
        reloaded = reload(folder)
        difference = check_same(sample_logits(reloaded), self.expected, "the reloaded export")
        self.check_weights(reloaded)
        return Checked(
            max_difference=difference,
            tolerance=allowed(self.expected),
            num_parameters=self.num_parameters,
            sparsity=self.sparsity,
            notes=self.notes,
        )
