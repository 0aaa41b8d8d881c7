"""Dropping blocks, or their attention or MLPs. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.surgery import CalibratedModel, Measure, Surgeon, SurgeryConfig


if TYPE_CHECKING:
    from torch import Tensor


_OF_GATES = ("gate_steps", "gate_lr", "gate_penalty")


class DropBlocks(SurgeryConfig):
    """Leave out what changes little: whole blocks, or the attention or MLP of some.

    By block influence: ShortGPT (Men et al. 2024, arXiv:2403.03853). One after another, each time what changes the
    output least: FinerCut (Zhang et al. 2024, arXiv:2405.18218), and of blocks by the loss SLEB (Song et al. 2024,
    arXiv:2402.09025). By gates that are learned while the model rests: FoldGPT (Liu et al. 2024, arXiv:2407.00928), the
    gates and their narrowing as in GDP (Guo et al. 2021, arXiv:2109.02220).
    """

    type: Literal["drop_blocks"] = "drop_blocks"
    """Name of the pass."""
    dropped: Annotated[float, Field(gt=0, lt=1, strict=True)] | Annotated[int, Field(ge=1, strict=True)]
    """How many parts go: a number, or a share of all that there are."""
    parts: Literal["blocks", "halves", "attention", "mlp"] = "blocks"
    """What may go: decoder blocks; each attention and each MLP by itself; one kind of them alone."""
    order: Literal["influence", "greedy", "gates"] = "influence"
    """`influence`: the blocks of least 1 - cos(input, output) go, all at once. `greedy`: one at a time goes, that whose
    absence `measure` shows least, without those that went before. `gates`: the blocks whose gates end lowest, which are
    learned for all together."""
    measure: Measure = "js_divergence"
    """For `greedy`. `loss` of the next token; between the logits and those of the whole model, `js_divergence` of their
    softmax, or the `angle` between them."""
    gate_steps: int = Field(default=100, ge=1)
    """For `gates`: steps of Adam, each over all calibration rows."""
    gate_lr: float = Field(default=0.05, gt=0)
    """For `gates`: their learning rate; what opens them starts at 1."""
    gate_penalty: float = Field(default=10.0, gt=0)
    """For `gates`: nats of loss for (mean gate - share of blocks that stay)^2."""
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
        if self.parts != "blocks" and self.order != "greedy":
            of = "influence is that" if self.order == "influence" else "gates are those"
            raise ConfigError(f"drop_blocks: {of} of whole blocks; type order: greedy, or parts: blocks")
        # A recipe that is written out and read again names every field.
        if self.order != "greedy" and self.measure != "js_divergence":
            raise ConfigError("drop_blocks: measure is for order: greedy; remove it, or type order: greedy")
        changed = [name for name in _OF_GATES if getattr(self, name) != type(self).model_fields[name].default]
        if changed and self.order != "gates":
            raise ConfigError(f"drop_blocks: {changed[0]} is for order: gates; remove it, or type order: gates")
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
            measure=self.measure if self.order == "greedy" else None,
            gates=self._gates if self.order == "gates" else None,
            first_layer=self.first_layer,
            writes_zeros=self.written_as_zeros,
        )

    def _gates(self, model: CalibratedModel, layers: range, open_share: float) -> Tensor:
        from leanmill.sparse.drop_blocks.gates import learned_gates

        return learned_gates(
            model,
            layers,
            open_share=open_share,
            penalty=self.gate_penalty,
            num_steps=self.gate_steps,
            learning_rate=self.gate_lr,
        )
