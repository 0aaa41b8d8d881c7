"""Passes: a model folder turned into another one, a block at a time. Importing this imports no torch.

A pass is a validated configuration of one of several kinds. A layer pass solves one linear layer after
another, given what the layer's inputs looked like on calibration text or how much the loss minds its weights; an
expert pass so the experts of one layer after another. A window pass trains the linear layers of some blocks together,
until the blocks compute what they did. A surgery (`core.surgery`) makes a model of another architecture
of the tensors. None sees the trainer, which streams the blocks through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from pydantic import Field, model_validator

from leanmill.core.config import Config
from leanmill.core.errors import ConfigError


if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from leanmill.core.facets import LowRank
    from leanmill.core.gram import Gram
    from leanmill.core.probes import Probe


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """What calibration showed of the inputs x of one linear layer, over all ranks."""

    num_tokens: int
    square_sum: Tensor
    """Sum of x^2 a feature [in], fp32."""
    gram: Gram | None
    """Sum of x x^T [in, in], fp32, where the solver asked for it."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What became of one layer."""

    weight: Tensor
    """[out, in] fp32."""
    squared_error: float | None = None
    """||(W' - W) X||^2 on the calibration inputs X, where the solver knows it."""


class LayerSolver(Protocol):
    """Turns the weight of one linear layer into its compressed one."""

    needs_gram: bool
    """Whether it needs more than `square_sum`; a gram matrix is [in, in]."""

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a weight [out, in] that does not fit, before anything is computed.

        Raises:
            ConfigError: It does not; the message says what to type.
        """
        ...

    def prepare(self, statistics: InputStatistics) -> Callable[[Tensor], Solution]:
        """Return what solves a layer's weight [out, in] fp32, which it may overwrite.

        Called once for all layers that share their inputs.

        Args:
            statistics: Of the inputs; the gram matrix may be used up.

        Raises:
            RunError: The inputs are such that nothing can be solved.
        """
        ...


class SensitiveSolver(Protocol):
    """Turns the weight of one linear layer into its compressed one, by how much the loss minds its weights."""

    def solve(self, weight: Tensor, sensitivity: Tensor) -> Solution:
        """Return what becomes of a layer's weight.

        Args:
            weight: [out, in] fp32, which may be overwritten.
            sensitivity: Mean over calibration rows of the squared gradient of the row's mean loss [out, in], fp32; the
                gradients themselves [rows, out, in] where the configuration `reads_each_row`.
        """
        ...


class WindowSolver(Protocol):
    """Trains the weights of linear layers in some neighbouring blocks together."""

    def layer(self, name: str, weight: Tensor) -> WindowLayer:
        """Return what stands for a layer's weight [out, in] fp32, which it keeps; equal on all ranks."""
        ...

    def optimizer(self, layers: Sequence[Any]) -> torch.optim.Optimizer:
        """Return what trains the layers of a window, each from `layer`."""
        ...

    def loss(self, found: Tensor, wanted: Tensor, size: float) -> Tensor:
        """Return how far a window's outputs are from what they were, a mean over tokens.

        Args:
            found: [B, S, H] fp32.
            wanted: The same of the model as it was.
            size: Mean of ||wanted||^2 over all tokens of the calibration rows.
        """
        ...

    def pull(self, layers: Sequence[Any], progress: float) -> Tensor | None:
        """Return what is added to the loss for the layers themselves.

        Args:
            layers: Of the window.
            progress: Share of the window's steps that were taken, 0 to below 1.
        """
        ...


class WindowLayer(Protocol):
    """A linear layer's weight in training; its parameters are what an optimizer takes."""

    def trained(self) -> Tensor:
        """Return the weight [out, in] that the window computes with, of which gradients are taken."""
        ...

    def solved(self) -> Tensor:
        """Return the weight [out, in] that is written."""
        ...


@dataclass(frozen=True, kw_only=True)
class ExpertLayer:
    """The experts of one layer, and what calibration sent to them."""

    index: int
    """Of the decoder block, from 0."""
    num_experts: int
    read: Callable[[int], dict[str, Tensor]]
    """Returns the weights of an expert, fp32 on the CPU: `gate` and `up` [I, H], `down` [H, I]."""
    activation: Callable[[Tensor], Tensor]
    """Between gate and product."""
    hidden: Tensor
    """This rank's tokens [T, H]."""
    chosen: Tensor
    """Their experts [T, K] int64."""
    weights: Tensor
    """Their combine weights [T, K] fp32."""
    total: Callable[[Tensor], Tensor]
    """Sums a CPU tensor over the ranks; a collective, which all ranks call equally often."""


@dataclass(frozen=True, kw_only=True)
class ExpertSolution:
    """What became of the experts of one layer."""

    weights: dict[int, dict[str, Tensor]]
    """By expert, as `ExpertLayer.read` gives them."""
    text: str
    """What was done, in one line."""
    inference: Mapping[str, float] = field(default_factory=dict)
    """What the pass must know of the layer at inference (`PassConfig.at_inference`); nothing where weights say all."""


class ExpertSolver(Protocol):
    """Turns the experts of a layer into compressed ones."""

    def check(self, config: Any) -> None:
        """Refuse a model, by its transformers configuration, before anything is computed.

        Raises:
            ConfigError: It does not fit; the message says what to type.
        """
        ...

    def solve(self, layer: ExpertLayer) -> ExpertSolution:
        """Return the new weights; every rank gets the same.

        Raises:
            RunError: The inputs are such that nothing can be solved.
        """
        ...


class PassConfig(Config):
    """Base of every pass's configuration; subclasses add `type: Literal["name"]`."""

    changes_architecture: ClassVar[bool] = False
    """Whether the model has other tensors afterwards."""

    @property
    def reads_text(self) -> bool:
        """Whether it looks at calibration rows."""
        return True

    def at_inference(self, model: nn.Module, layers: Mapping[int, Mapping[str, float]]) -> Sequence[Probe]:
        """Have the model it made compute what weights alone do not say; return what looks on at an evaluation.

        Args:
            model: The causal LM of the folder that was written, in eval mode.
            layers: `ExpertSolution.inference` of the layers that have some, by index of the block.
        """
        return ()


class MergingPassConfig(PassConfig):
    """Base of passes that take weights of other models of the same shape, one after another."""

    models: list[str] = Field(min_length=1)
    """Folders, or hub names, of the models to merge in, in this order; in a phase also `phase:NAME`."""

    @property
    def reads_text(self) -> bool:
        return False

    def taken(self, mine: Tensor, other: Tensor) -> Tensor:
        """Return which weights of another model are taken, as bool.

        Args:
            mine: A tensor of the model [..., in], fp32.
            other: The same of the other one.
        """
        raise NotImplementedError


class LinearPassConfig(PassConfig):
    """Base of passes over linear layers."""

    targets: list[str] | None = None
    """Patterns of weights to take; None takes every linear weight of the decoder blocks."""
    exclude: list[str] = Field(default_factory=list)
    """Patterns of weights to leave out again."""

    def check_shape_of(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a weight [out, in] that does not fit, before anything is computed.

        Raises:
            ConfigError: It does not; the message says what to type.
        """


@dataclass(frozen=True, kw_only=True)
class SeenTokens:
    """What is known of the tokens of one batch at a block, by which they may count more or less."""

    ids: Tensor
    """[B, S] int64."""
    frequencies: Tensor
    """How often each token is in the calibration rows of all ranks, int64 [vocabulary]."""
    inputs: Tensor | None = None
    """Of the block, [B, S, H]; where `counts_tokens_by` is `states`."""
    outputs: Tensor | None = None
    """Of the block, likewise."""
    maps: Tensor | None = None
    """Attention [B, heads, S, S], queries before keys; where `counts_tokens_by` is `attention`."""


class LayerPassConfig(LinearPassConfig):
    """Base of passes that solve linear layers by what their inputs are."""

    @property
    def counts_tokens_by(self) -> Literal["ids", "states", "attention"] | None:
        """What of `SeenTokens` `token_weights` looks at, beside their ids; None where all tokens count alike."""
        return None

    def token_weights(self, seen: SeenTokens) -> Tensor:
        """Return what the inputs of a block's layers are multiplied by before their statistics, [B, S]."""
        raise NotImplementedError

    def check_shape_of(self, name: str, shape: tuple[int, int]) -> None:
        self.solver().check(name, shape)

    @property
    def bits_per_weight(self) -> float | None:
        """Bits of a weight afterwards, one that is kept whole having 16; a share of zeros counts as so much less.

        What searches over levels hold against a budget, without scales and indices. None is not known.
        """
        return None

    def solver(self) -> LayerSolver:
        """Return what solves a layer."""
        raise NotImplementedError


class SensitivePassConfig(LinearPassConfig):
    """Base of passes that solve linear layers by how much the loss minds their weights."""

    reads_each_row: ClassVar[bool] = False
    """Whether it is given the gradient of every calibration row instead of their mean square."""

    def solver(self) -> SensitiveSolver:
        """Return what solves a layer."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """A weight as what stays of it and a delta of low rank, which trains on."""

    weight: Tensor
    """[out, in] fp32: what stays."""
    factors: LowRank
    kept_as: str
    """The form that holds what stays without loss, see `model.frozen_dtype`."""


class DecomposingSolver(Protocol):
    """Takes a delta of low rank out of linear weights, in one of several ways for each."""

    num_choices: int
    """Ways there are."""

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Refuse the weights [out, in] of a model, before anything is computed.

        Raises:
            ConfigError: With what to type.
        """
        ...

    def cost(self, name: str, weight: Tensor, sensitivity: Tensor | None, choice: int) -> float:
        """Return what one way costs for a layer."""
        ...

    def choose(self, costs: Tensor, shapes: Sequence[tuple[int, int]]) -> list[int]:
        """Return the way of each layer, given the costs [layers, ways] fp64."""
        ...

    def solve(
        self, name: str, weight: Tensor, sensitivity: Tensor | None, choice: int, dtype: torch.dtype
    ) -> Decomposition:
        """Return what becomes of a layer.

        Args:
            name: Of the layer.
            weight: [out, in] fp32.
            sensitivity: Of the same shape, see `SensitiveSolver`; None where no text was read.
            choice: Of the ways.
            dtype: What the weight will be stored in.
        """
        ...


class DecomposingPassConfig(LinearPassConfig):
    """Base of passes that take a delta of low rank out of linear weights.

    Deltas are written as an adapter beside the weights, so nothing may run over these afterwards.
    """

    def solver(self) -> DecomposingSolver:
        """Return what takes layers apart."""
        raise NotImplementedError


class ObservingPassConfig(LinearPassConfig):
    """Base of passes that leave a model as it is and note a score of each decoder block, for what trains it."""

    def score(self, layers: Sequence[tuple[Tensor, Tensor]]) -> float:
        """Return the score of a block.

        Args:
            layers: Weight [out, in] and sum of x^2 over calibration tokens [in] of each target, fp32 on the CPU.
        """
        raise NotImplementedError


class WindowPassConfig(LinearPassConfig):
    """Base of passes that train the linear layers of some neighbouring blocks together, window after window."""

    window_blocks: int = Field(default=2, ge=1)
    """Blocks that are trained together."""
    overlap_blocks: int = Field(default=1, ge=0)
    """Blocks that a window has in common with the one before it, which train once more; below `window_blocks`."""
    epochs: int = Field(default=3, ge=1)
    """Times that every calibration row goes through a window, a batch of each rank a step."""
    reconstruct: Literal["same_inputs", "dense_inputs", "both"] = "both"
    """What a window's outputs are held against: those of the model as it was, given the `same_inputs`, which blocks
    that were solved have made, or its own (`dense_inputs`), or both."""

    @model_validator(mode="after")
    def _windows_move(self) -> Self:
        if self.overlap_blocks >= self.window_blocks:
            raise ConfigError(
                f"overlap_blocks={self.overlap_blocks} with window_blocks={self.window_blocks}: windows would not "
                f"move; set overlap_blocks to {self.window_blocks - 1} or less"
            )
        return self

    def solver(self, seed: int) -> WindowSolver:
        """Return what solves a window; what it draws is a function of the recipe's seed."""
        raise NotImplementedError


class ExpertPassConfig(PassConfig):
    """Base of passes that solve the experts of a mixture."""

    def solver(self) -> ExpertSolver:
        """Return what solves the experts of a layer."""
        raise NotImplementedError
