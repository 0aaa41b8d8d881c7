"""What the formats of whole models share: stages folded into plain weights, adapters merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from leanmill.core.around import Beside, iter_arounds, take_off_own
from leanmill.core.errors import RunError
from leanmill.core.sites import iter_sites
from leanmill.core.stage import Slot
from leanmill.core.transposed import as_linears
from leanmill.export.activations import settle_activations
from leanmill.export.compare import check_same, largest_difference, sample_logits
from leanmill.export.folding import fold, folded_weights
from leanmill.export.formats import Activations, Format
from leanmill.trainer.rebuild import Rebuilt


class FoldedFormat(Format):
    """Folds the model: every stage into its weight (zeros of a mask in place), adapters merged, all in fp32."""

    packing: ClassVar[str] = "none"
    """What input stages name in `formats` where the format repeats them."""
    holds_own_forms: ClassVar[bool] = False
    """Whether it writes models of families of Leanmill's own in the place of plain ones."""

    def __init__(self, rebuilt: Rebuilt, out_dir: Path, activations: Activations) -> None:
        self.rebuilt, self.model, self.activations = rebuilt, rebuilt.model, activations
        model = self.model
        self.trained = sample_logits(model)
        """Logits as trained."""
        self.before_folding(model)
        self.notes = settle_activations(model, activations, self.packing)
        self.expected = sample_logits(model)
        """Logits with what was left out left out."""
        if self.notes:
            self.notes += (f"largest logit difference by that: {largest_difference(self.expected, self.trained):.2e}",)
        self.staged = folded_weights(model)
        """Weights that training multiplied with, by parameter name."""
        self.masked = _masks(model)
        self.beside = beside_of(model)
        """What stands around modules and does not fold into them."""
        self.after_settling(model)
        own = take_off_own(model) if self.holds_own_forms else None
        fold(model)
        if own is not None:
            self.model = own.make(model)
        self.prefix = "" if own is None else own.prefix
        """Before the names of the plain model's parameters."""
        check_same(sample_logits(self.model), self.expected, "the folded model")

    def before_folding(self, model: Any) -> None:
        """Take from the trained model what the format needs, its input stages in place."""

    def after_settling(self, model: Any) -> None:
        """Take from the model what the format needs, without the input stages that it does not repeat."""

    @property
    def sparsity(self) -> dict[str, float]:
        """Share of zeros in each weight that carries a mask."""
        return {name: (self.staged[name] == 0).float().mean().item() for name in self.masked}

    @property
    def num_parameters(self) -> int:
        """Of the folded model."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def left_out(self) -> tuple[str, ...]:
        """What a format must say that has no place for weights beside the model's own."""
        return left_out(self.beside)

    def check_weights(self, reloaded: Any, *, but: frozenset[str] = frozenset()) -> None:
        """Look at the weights read back: equal to the trained ones, N of every M kept.

        Args:
            reloaded: The model that was loaded back.
            but: Names of parameters that the format holds otherwise.

        Raises:
            RunError: One is another.
        """
        as_linears(reloaded)
        for name in self.staged.keys() - but:
            _check_weight(name, reloaded.get_parameter(self.prefix + name), self.staged[name], self.masked)


def beside_of(model: Any) -> tuple[Beside, ...]:
    """Return what stands around the model's modules and does not fold into them."""
    return tuple(beside for _, _, around in iter_arounds(model) if (beside := around.beside()) is not None)


def left_out(besides: Sequence[Beside]) -> tuple[str, ...]:
    """Return what a report says of `besides` where the format has no place for their weights."""
    return tuple(
        f"{len(beside.weights)} weights beside the model's own are left out; --to hf carries them"
        if beside.weights
        else " ".join(beside.notes)
        for beside in besides
    )


def prepare_config(model: Any, rebuilt: Rebuilt, folder: Path) -> None:
    """Make config and generation settings those of a model to use, and store the tokenizer."""
    from transformers import AutoTokenizer, GenerationConfig

    model.config.use_cache = True
    model.config._experts_implementation = None
    if rebuilt.tokenizer_dir is not None:
        tokenizer = AutoTokenizer.from_pretrained(str(rebuilt.tokenizer_dir))
        tokenizer.save_pretrained(folder)
        for key in ("bos_token_id", "eos_token_id"):
            if getattr(model.config, key, None) is None:
                setattr(model.config, key, getattr(tokenizer, key))
        model.generation_config = GenerationConfig.from_model_config(model.config)
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _masks(model: Any) -> dict[str, tuple[int, int] | None]:
    """By parameter name, the N:M of each masked weight; None where its mask has another pattern."""
    masked: dict[str, tuple[int, int] | None] = {}
    for _, site in iter_sites(model):
        stage = site.stage(Slot.MASK)
        if stage is not None:
            # Rotated back, what was zero is not.
            is_rotated = site.stage(Slot.ROTATE) is not None
            masked[site.weight_name] = None if is_rotated else stage.pattern()
    return masked


def _check_weight(name: str, found: Tensor, weight: Tensor, masked: dict[str, tuple[int, int] | None]) -> None:
    # Adapters merged on top change a weight, and only where there is no mask to keep.
    if name in masked and not torch.equal(found, weight):
        raise RunError(f"{name} of the reloaded export is not the trained weight; nothing was written")
    pattern = masked.get(name)
    if pattern is not None:
        most, group_size = pattern
        kept = (found.unflatten(-1, (-1, group_size)) != 0).sum(-1)
        if int(kept.max()) > most:
            raise RunError(f"{name} of the reloaded export keeps {int(kept.max())} of {group_size} weights, not {most}")
