"""Surgeries: passes that make a model of another architecture. Importing this imports no torch.

A surgery is a validated configuration; its surgeon says what becomes of each tensor, some after they looked at text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from leanmill.core.passes import DecomposingPassConfig, ObservingPassConfig, PassConfig


if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class StoredBlock:
    """The tensors of one decoder block as a folder stores them, read when asked for."""

    index: int
    """Of the block, from 0."""
    names: frozenset[str]
    """Of its tensors, relative to the block, such as `mlp.up_proj.weight`."""
    read: Callable[[str], Tensor]
    """Returns a tensor by such a name, on the CPU, in memory of its own."""


class Surgeon(Protocol):
    """Makes a model of another architecture of a model's tensors; subclasses say what they change."""

    def config(self, before: Any) -> Any:
        """Return the transformers configuration of the new model; cheap, and called before anything is read.

        Args:
            before: The configuration of the model there is; it stays as it is.

        Raises:
            ConfigError: The model cannot become what was asked for; the message says what to type.
        """
        ...

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the new block by name, relative to it, as few at a time in memory as can be.

        Called after `config`, for one block after another.
        """
        ...

    def place(self, index: int) -> int | None:
        """Return which block of the new model the one at `index` becomes; None leaves it out."""
        return index

    def outside(self, name: str, tensor: Tensor) -> Tensor:
        """Return what becomes of a tensor that lies in no block, by its full name."""
        return tensor

    def rest(self, names: Sequence[str], read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the new model that lie in no block, by full name.

        Args:
            names: Of those of the old model that lie in no block.
            read: Returns a stored tensor by its full name, on the CPU, in memory of its own.
        """
        return ((name, self.outside(name, read(name))) for name in names)

    def further(self) -> Iterator[tuple[str, Any]]:
        """Yield further models to write into folders within the new one's, as name and transformers configuration.

        The other methods speak of each until the next one is asked for, and of the new model again afterwards.
        """
        return iter(())

    def describe(self) -> str:
        """Return in one line what was made; called last."""
        ...


@dataclass(frozen=True, kw_only=True)
class ExpertGradients:
    """How large the experts of one layer and their gradients are, each expert's weights taken together; fp64 [E]."""

    squared_gradient: Tensor
    """Squared norm of the gradient of the mean loss of all calibration rows."""
    squared_weight: Tensor
    """Squared norm of the weights."""


class GradientSurgeon(Surgeon, Protocol):
    """One whose configuration `reads_gradients`."""

    def see(self, gradients: Mapping[int, ExpertGradients]) -> None:
        """Look at the layers that have experts, by index of the block; called after `config` and before `block`."""
        ...


Part = tuple[int, Literal["block", "attention", "mlp"]]
"""Of a model, by index of the block: all of it, or one of its halves."""


Measure = Literal["loss", "js_divergence", "angle"]
"""Of a model whose parts are skipped: `loss` is that of the next token. The others are between its logits and those of
the whole model: the Jensen-Shannon divergence of their softmax, nats, and the angle between them over pi."""


@dataclass(frozen=True, kw_only=True)
class SeenBlock:
    """A decoder block with its weights in memory, about to see calibration rows."""

    index: int
    """Of the block, from 0."""
    module: nn.Module
    """In eval mode, on the device, its parameters frozen; hooks on it see the run."""
    run: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    """Yields input and output [B, S, H] of each of this rank's batches, on the CPU. To be called once, last: its
    outputs become the next block's inputs."""
    peek: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    """Yields the same, and leaves the inputs as they are; any number of times."""


class CalibratedModel(Protocol):
    """A model that exists, and the calibration rows that passes may send through it."""

    @property
    def rows(self) -> Sequence[Mapping[str, Tensor]]:
        """This rank's batches: `input_ids` and `position_ids` [B, S] int64."""
        ...

    def blocks(self) -> Iterator[SeenBlock]:
        """Yield one block after another; only one is in memory."""
        ...

    def without(self, skipped: Sequence[frozenset[Part]], measure: Measure = "loss") -> list[float]:
        """Return what the model is like without the parts of each set, as a mean over tokens; a collective.

        A part that is skipped adds nothing to the residual stream. One block at a time is in memory.
        """
        ...

    def whole(self) -> nn.Module:
        """Load the causal LM, fp32, in eval mode, its parameters frozen; takes memory for all of it."""
        ...

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks; a collective."""
        ...


class LookingSurgeon(Surgeon, Protocol):
    """One whose configuration `looks`."""

    def look(self, model: CalibratedModel) -> Any:
        """Decide what to do by calibration rows; called after `config` and before `block`. A collective.

        Returns:
            The transformers configuration of the new model, with the sizes that `config` gave; how they are shared out
            over layers may differ.

        Raises:
            RunError: The rows do not tell.
        """
        ...


class SurgeryConfig(PassConfig):
    """Base of passes that make another architecture."""

    changes_architecture: ClassVar[bool] = True

    @property
    def reads_text(self) -> bool:
        return self.reads_gradients or self.looks

    @property
    def looks(self) -> bool:
        """Whether its surgeon sends calibration rows through the model before it operates."""
        return False

    @property
    def writes_further(self) -> bool:
        """Whether its surgeon yields `further` models."""
        return False

    @property
    def reads_gradients(self) -> bool:
        """Whether its surgeon must see what gradients experts have on calibration rows."""
        return False

    def surgeon(self, seed: int) -> Surgeon:
        """Return what operates on one model.

        Args:
            seed: The recipe's, for what is drawn.
        """
        raise NotImplementedError


def lost_further(passes: Sequence[PassConfig]) -> str | None:
    """Return what is wrong where what a pass writes beside its model would be lost to one behind; None if nothing."""
    for config in passes[:-1]:
        if isinstance(config, DecomposingPassConfig):
            kind = config.type  # type: ignore[attr-defined]
            return f"passes: {kind} leaves a part of each weight in an adapter, which fits no others; put it last"
        if isinstance(config, ObservingPassConfig):
            kind = config.type  # type: ignore[attr-defined]
            return f"passes: {kind} notes how the model is, which a pass behind it changes; put {kind} last"
        if isinstance(config, SurgeryConfig) and config.writes_further:
            kind = config.type  # type: ignore[attr-defined]
            return (
                f"passes: {kind} writes further models beside its own, of which a pass behind it takes only that; put "
                f"{kind} last, or ask it for one model"
            )
    return None
