"""Slots and stages: what may happen to the operands of a matmul, in one order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import ClassVar

import torch
from torch import Tensor, nn

from leanmill.core.facets import Codes, FloatCodes, LearnedGrid, LowRank, Packing, PartStaging


Decode = Callable[[Tensor, torch.dtype], Tensor]
"""Given what a frozen weight is kept as, and a dtype: the weight."""

AROUND = "around"
"""Under this name a module holds what techniques put around its call."""


class Slot(IntEnum):
    """The only order of weight stages, whatever order a recipe lists its techniques in.

    A delta before the mask is merged inside it; mask before quantiser keeps N:M exact (the other way
    round, ties break it); a rotation before both, so that what is masked and rounded is what the
    matmul sees. Deltas are sums and commute, so several may share their slot; the others hold one. A frozen weight
    that is kept in fewer bytes is decoded before all of them.
    """

    COMPACT = 0
    DELTA = 1
    ROTATE = 2
    MASK = 3
    QUANT = 4

    @property
    def key(self) -> str:
        """Name of the slot inside `site.stages` and in state dicts."""
        return self.name.lower()

    @property
    def is_shared(self) -> bool:
        """Whether several stages may stand in this slot."""
        return self is Slot.DELTA


class InputSlot(IntEnum):
    """The only order of stages on the activations that enter a matmul; each holds one."""

    NORM = 0
    ROTATE = 1
    QUANT = 2

    @property
    def key(self) -> str:
        """Name of the slot inside `site.inputs` and in state dicts."""
        return self.name.lower()


class TechniqueModule(nn.Module):
    """A module that a technique brought: no part of the plain model, whose export is without it."""

    decayed: ClassVar[tuple[str, ...]] = ()
    """Names of own parameters that weight decay pulls at, as it does at weights; scales are left alone."""

    def decays(self, name: str) -> bool:
        """Whether weight decay pulls at the own parameter of this name, if it would at one of the plain model."""
        return name in self.decayed

    def blocks(self) -> Iterator[nn.Module]:
        """Yield decoder blocks of its own: they are sharded, recomputed and compiled as the model's are."""
        yield from ()

    def reset_parameters(self) -> None:
        """Fill own parameters and buffers after they have been materialised from meta.

        Called with the random generator already seeded for this module, on full (unsharded) tensors.
        """


def added_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield every parameter that techniques added to `model`; output branches, which PEFT adds, are not among them."""
    for module in model.modules():
        if isinstance(module, TechniqueModule):
            yield from module.parameters()


def is_added_tensor(name: str) -> bool:
    """Whether a technique brought the parameter or buffer of this dotted name; else it is the plain model's."""
    return ".stages." in name or ".inputs." in name or f".{AROUND}." in name


class OperandStage(TechniqueModule):
    """What weight and input stages share."""

    technique: ClassVar[str]
    """Registered name of the technique, for messages."""


class Stage(OperandStage):
    """One transform of a weight `[..., out, in]`, differentiable, straight-through inside.

    Rules for implementers:

    - Plain tensor code on the weight; no `to_local()`, no cached references to parameters.
    - Compute statistics (scales, norms) in fp32 whatever the weight's dtype; return that dtype.
    - State that training changes is a Parameter of at least 1 dim (FSDP2 refuses 0-dim ones); a
      fixed mask is a frozen bool Parameter, so it is sharded with the weight; values that a step
      rule schedules are non-persistent fp32 buffers of shape (1,).
    - A stage may be called many times in a step: by micro-batches, chunks of a loss, recomputation. What
      its backward adds of its own accord (a decay) is to be used up by the first one and filled by a step rule.
    - Keep nothing weight-sized alive after `forward`: the site recomputes it in backward. References to
      its input are free.
    - Random numbers come from `leanmill.core.noise`: torch's generators would draw others in backward.
    - `forward` may run on other tensors than the module's own (`torch.func.functional_call`): read
      state through `self`, keep none of it between calls.
    """

    slot: ClassVar[Slot]
    once_a_step: ClassVar[bool] = False
    """Whether an engine may run this stage once an optimizer step, for all uses of the weight.

    It may where `forward` depends on the weight and on own tensors that nothing writes between the first
    forward and the last backward of a step. Its backward then runs once too, on the gradient of all
    micro-batches and ranks, and on that alone does the gradient of own parameters depend."""

    writes_weight: ClassVar[bool] = False
    """Whether a rule adds to the weight under this stage as training goes, so that it stays in fp32 though frozen."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the staged weight, same shape and dtype."""
        raise NotImplementedError

    @property
    def bytes_watched(self) -> int:
        """Bytes that a rank holds in some steps to look at the weight's gradient, whole however it is sharded."""
        return 0

    def on_part(self, part: Tensor, shape: torch.Size) -> PartStaging | None:
        """Stage a shard of a weight, for stages that run `once_a_step`.

        Args:
            part: [n, ...], n >= 0 neighbours along the first dim of the weight.
            shape: Of the whole weight.

        Returns:
            None where a stage needs the whole weight. `self.by_itself(part)` where rows (experts of a
            stacked weight) do not depend on each other. Else a generator that asks for what it needs; the
            number of its questions must not depend on the part. Own parameters whose first dim is that
            of the weight are the part's, others are whole; statistics carry no gradient.
        """
        return None

    def by_itself(self, part: Tensor) -> PartStaging:
        """Stage `part` as if it were the whole weight."""
        return self(part)  # type: ignore[no-any-return]
        yield

    def stages_rows_alone(self, part: Tensor, shape: torch.Size) -> bool:
        """Whether `on_part` asks for nothing: rows, or experts of a stacked weight, do not depend on each other."""
        staging = self.on_part(part, shape)
        return getattr(staging, "gi_code", None) is Stage.by_itself.__code__

    def for_backward(self, weight: Tensor) -> Tensor:
        """Return the weight that the gradient of the input is multiplied with, where it is another.

        Override it to give the backward matmul a weight of its own; it gets no gradient. Stages that
        do not override it do in the backward what they do in forward.
        """
        raise NotImplementedError

    @property
    def has_backward_weight(self) -> bool:
        """Whether this stage overrides `for_backward`."""
        return type(self).for_backward is not Stage.for_backward

    def undo(self, weight: Tensor) -> Tensor:
        """Return the plain weight of a staged one, for rotations that the input's rotation cancels."""
        return weight

    def initialise(self, weight: Tensor) -> None:
        """Fill own parameters from the weight that arrives at this stage, once that is loaded.

        Called after `reset_parameters`, on full fp32 tensors on the CPU, without gradients; a resumed
        run overwrites the result with what it saved.
        """

    def packing(self, shape: torch.Size) -> Packing | None:
        """Return a smaller form of weights of `shape` that this stage, and perhaps stages after it, have staged."""
        return None

    def pattern(self) -> tuple[int, int] | None:
        """N and M, where the staged weight keeps at most N of every M neighbours along its last dim."""
        return None

    def low_rank(self) -> LowRank | None:
        """The delta that this stage adds, where it is of low rank."""
        return None

    def trained_factors(self) -> tuple[nn.Parameter, nn.Parameter, float] | None:
        """Return the parameters A [rank, in] and B [out, rank], and s, where this stage adds s B A and trains both."""
        return None

    def codes(self, weight: Tensor) -> Codes | None:
        """Return the integers that `forward` makes of the weight that arrives here, where it makes some."""
        return None

    def float_codes(self, weight: Tensor) -> FloatCodes | None:
        """Return the floats of 4, 6 or 8 bits that `forward` makes of the weight, where it makes some."""
        return None

    def trained_bits(self) -> tuple[int, ...]:
        """Bits a weight that it was trained to be rounded to, where those are several; see `switch_to`."""
        return ()

    def switch_to(self, num_bits: int) -> None:
        """Round to so many of the `trained_bits` from now on."""
        raise NotImplementedError

    def learned_grid(self) -> LearnedGrid | None:
        """The grid that this stage rounds to, where that is all it does; differentiable."""
        return None

    def product(
        self,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        grid: LearnedGrid | None,
        decode: Decode | None,
    ) -> Tensor:
        """Multiply tokens with the staged weight in a leaner way than through that weight.

        Override it where there is one. It is used where this stage is the only one of a linear layer, or
        is followed by one with a `learned_grid` alone, and nothing happens to the activations.

        Args:
            tokens: [..., in], in the dtype of the matmul.
            weight: [out, in], what arrives at this stage, or what a frozen weight is kept as.
            bias: [out] or None.
            grid: Of the stage that follows, if one does.
            decode: Makes of that the [out, in] that arrives, in the dtype asked for; None where it is that.

        Returns:
            [..., out]. Nothing weight-sized but what it was given may be kept for backward.
        """
        raise NotImplementedError

    def decoder(self) -> Decode | None:
        """What this stage does, in any dtype, where it is to decode a frozen weight."""
        return None

    @property
    def has_product(self) -> bool:
        """Whether this stage overrides `product`."""
        return type(self).product is not Stage.product

    @property
    def has_initialiser(self) -> bool:
        """Whether this stage overrides `initialise`."""
        return type(self).initialise is not Stage.initialise


class InputStage(OperandStage):
    """One transform of activations `[..., in]`, a token (last dim) at a time.

    The rules are those of `Stage`. Tokens may come in any shape, order and number: expert weights see
    them before they are sorted by expert.
    """

    slot: ClassVar[InputSlot]
    is_cancelled: ClassVar[bool] = False
    """Whether a plain layer computes the same without this stage: the weight's `undo` cancels it, or all it does is in
    `on_product`."""
    formats: ClassVar[tuple[str, ...]] = ()
    """Packings of an export whose layers do to their input what this stage does."""
    may_be_left_out: ClassVar[bool] = True
    """Whether an export may be asked to leave this stage out: it rounds, and the model is nearly the same without."""
    norm_eps: ClassVar[float | None] = None
    """Of a root-mean-square norm without gain, which this stage is; None where it is none."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the staged activations, same shape and dtype."""
        raise NotImplementedError

    def on_product(self, product: Tensor) -> Tensor:
        """Return what the matmul [..., out] gave, as it is, for stages that change the gradient which it gets."""
        return product

    def unrounded(self) -> InputStage | None:
        """Return what is left of this stage with float activations: a rotation that the weight cancels, or None."""
        return None
