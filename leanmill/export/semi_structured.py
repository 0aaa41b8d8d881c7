"""2:4 weights as the values and metadata of torch's semi-structured tensors: 0.5625 of a weight's bytes in bf16.

A layer has `<name>.values`, bf16 [out, in / 2], and `<name>.meta`, int16 [out, in / 16], as
`torch.sparse.SparseSemiStructuredTensorCUTLASS` holds them, in the place of `<name>.weight`; files and loader are
those of `packed`. On an NVIDIA GPU from compute capability 8.0 on the loaded layers multiply with the GPU's own
sparse instructions; elsewhere with the dense weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from leanmill.core.errors import RunError
from leanmill.core.site import LinearSite
from leanmill.core.sites import Sites, iter_sites
from leanmill.core.stage import Slot
from leanmill.export.compare import allowed, check_same, largest_difference, sample_logits
from leanmill.export.folded import FoldedFormat, prepare_config
from leanmill.export.formats import Checked
from leanmill.export.packed_folder import load, save
from leanmill.export.sparse_layer import SparseLinear


ROW_MULTIPLE, COLUMN_MULTIPLE = 32, 64
"""Of the shapes that torch's semi-structured tensors have in bf16."""


class SemiStructuredFormat(FoldedFormat):
    """2:4 linear weights as values and metadata, for torch's semi-structured tensors."""

    label: ClassVar[str] = "2:4"

    @classmethod
    def covers(cls, model: Any) -> str | None:
        found = False
        for name, site in _sparse(model):
            found = True
            rows, columns = site.raw_weight.shape
            if rows % ROW_MULTIPLE or columns % COLUMN_MULTIPLE:
                return (
                    f"{name} is [{rows}, {columns}], and torch's 2:4 tensors have rows in multiples of {ROW_MULTIPLE}, "
                    f"columns in multiples of {COLUMN_MULTIPLE}; exclude it from the technique that masks, or use "
                    f"--to hf, which keeps the zeros in place"
                )
        return (
            None
            if found
            else (
                "no linear weight of this run keeps 2 of every 4 (nm_sparsity, mask_llm and others with 2:4 do); use "
                "--to hf"
            )
        )

    def after_settling(self, model: Any) -> None:
        self.names = [name for name, _ in _sparse(model)]

    def write(self, folder: Path) -> None:
        prepare_config(self.model, self.rebuilt, folder)
        layers = {
            name: SparseLinear.of(self.staged[f"{name}.weight"], self.model.get_submodule(name).bias)
            for name in self.names
        }
        save(self.model, layers, {}, folder)

    @torch.no_grad()
    def check(self, folder: Path) -> Checked:
        reloaded = load(folder)
        for name in self.names:
            weight = self.staged[f"{name}.weight"].to(torch.bfloat16)
            found = reloaded.get_submodule(name).weight_values()
            if not torch.equal(found, weight.float()):
                raise RunError(f"{name} of the 2:4 export is not the trained weight in bf16; nothing was written")
            self.model.get_submodule(name).weight.copy_(weight)
        found_logits, expected = sample_logits(reloaded), sample_logits(self.model)
        difference = check_same(found_logits, expected, "the reloaded 2:4 export")
        self.check_weights(reloaded, but=frozenset(f"{name}.weight" for name in self.names))
        rounded = largest_difference(expected, self.expected)
        return Checked(
            max_difference=difference,
            tolerance=allowed(expected),
            num_parameters=self.num_parameters,
            sparsity=self.sparsity,
            compared="largest logit difference to the trained model with these weights in bf16",
            notes=(
                *self.notes,
                *self.left_out,
                f"{len(self.names)} linear weights as 2:4 values in bf16 and metadata; the rounding to bf16 moves the "
                f"largest logit by {rounded:.2e}",
            ),
        )


def _sparse(model: nn.Module) -> Iterator[tuple[str, LinearSite]]:
    """Yield (name, site) of linear weights that keep at most 2 of every 4."""
    sites = Sites(model)
    for name, site in iter_sites(model):
        mask = site.stage(Slot.MASK)
        if not isinstance(site, LinearSite) or mask is None or sites.tied_to(site):
            continue
        pattern = mask.pattern()
        if pattern is not None and pattern[0] <= 2 and pattern[1] == 4 and site.stage(Slot.ROTATE) is None:
            yield name, site
