"""Dropping blocks, or their attention or MLPs. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.surgery import Measure, Surgeon, SurgeryConfig


class DropBlocks(SurgeryConfig):
    """Leave out what changes little: whole blocks, or the attention or MLP of some.

    By block influence: ShortGPT (Men et al. 2024, arXiv:2403.03853). One after another, each time what changes the
    output least: FinerCut (Zhang et al. 2024, arXiv:2405.18218), and of blocks by the loss SLEB (Song et al. 2024,
    arXiv:2402.09025).
    """

    type: Literal["drop_blocks"] = "drop_blocks"
    """Name of the pass."""
    dropped: Annotated[float, Field(gt=0, lt=1, strict=True)] | Annotated[int, Field(ge=1, strict=True)]
    """How many parts go: a number, or a share of all that there are."""
    parts: Literal["blocks", "halves", "attention", "mlp"] = "blocks"
    """What may go: decoder blocks; each attention and each MLP by itself; one kind of them alone."""
    order: Literal["influence", "greedy"] = "influence"
    """`influence`: the blocks of least 1 - cos(input, output) go, all at once. `greedy`: one at a time goes, that whose
    absence `measure` shows least, without those that went before."""
    measure: Measure = "js_divergence"
    """For `greedy`. `loss` of the next token; between the logits and those of the whole model, `js_divergence` of their
    softmax, or the `angle` between them."""
    first_layer: int = Field(default=0, ge=0)
    """The first block of which anything may go."""
    written_as_zeros: bool = False
    """Write parts that go as zeros in what projects their output. For attention and MLPs, since no configuration says
    that a layer has none: the same function in a model as large as before."""

    @model_validator(mode="after")
    def _can_be_written(self) -> DropBlocks:
        if self.parts != "blocks" and not self.written_as_zeros:
            raise ConfigError(
                f"drop_blocks: parts={self.parts} leaves blocks without attention or MLP, which no transformers "
                f"configuration can say; type written_as_zeros: true, and the pass remove_zeros behind it where the "
                f"model may become a pruned_llama, or parts: blocks"
            )
        if self.parts != "blocks" and self.order == "influence":
            raise ConfigError("drop_blocks: influence is that of whole blocks; type order: greedy, or parts: blocks")
        # A recipe that is written out and read again names every field.
        if self.order == "influence" and self.measure != "js_divergence":
            raise ConfigError("drop_blocks: measure is for order: greedy; remove it, or type order: greedy")
        return self

    @property
    def looks(self) -> bool:
        return True

    def surgeon(self, seed: int) -> Surgeon:
        from leanmill.sparse.drop_blocks.surgeon import Dropping

        kinds = {"blocks": ("block",), "halves": ("attention", "mlp")}.get(self.parts, (self.parts,))
        return Dropping(
            dropped=self.dropped,
            kinds=kinds,  # type: ignore[arg-type]
            measure=None if self.order == "influence" else self.measure,
            first_layer=self.first_layer,
            writes_zeros=self.written_as_zeros,
        )
