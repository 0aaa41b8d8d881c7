"""What a staged matmul multiplies: captured where forward begins, computed there and once more in backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from leanmill.core.expert_shards import part_here
from leanmill.core.stage import Decode, InputStage, Stage


def recomputed(function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """Run `function` so that nothing it computes from the weights is kept for backward.

    Non-reentrant checkpointing stops recomputing at the last tensor that backward needs; a matmul
    saves its operands before it runs, so the matmul itself is not repeated.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(  # type: ignore[no-any-return]
        function, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
    )


def lend(weight: Tensor, held: Tensor) -> Tensor:
    """Return `held` for a matmul; the gradient goes to `weight`, in its dtype.

    Args:
        weight: The parameter, whose `grad` then adds up the gradient of the staged weight.
        held: Its staged weight, of the same shape and any dtype.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return held
    return _Lend.apply(weight, held)  # type: ignore[no-any-return]


class _Lend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, held: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return held.view_as(held)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.to(ctx.dtype), None


class Operands:
    """The raw weight and the state of every stage of one site, captured where forward began.

    Backward recomputes from these tensors and never reads the modules again, so a context that lends
    a module other parameters (tensor and expert parallelism, PEFT's `target_parameters`), or a step
    that has gone on, cannot give it other ones.
    """

    def __init__(self, weight: Tensor, stages: Sequence[Stage], inputs: Sequence[InputStage]) -> None:
        self.stages, self.inputs = tuple(stages), tuple(inputs)
        self._keys: list[list[str]] = []
        # Not among the tensors that autograd watches: a rule, or a backward, may write them.
        self._buffers = [dict(stage.named_buffers()) for stage in (*stages, *inputs)]
        tensors = [weight]
        for stage in (*stages, *inputs):
            named = dict(stage.named_parameters())
            self._keys.append(list(named))
            tensors += named.values()
        self.tensors: tuple[Tensor, ...] = tuple(tensors)
        """The weight, then the parameters of each stage; pass them through `recomputed`."""

    def on_this_rank(self) -> Operands:
        """Take this rank's part of every tensor that ranks share; for experts, of which each rank has some."""
        self.tensors = tuple(part_here(tensor) for tensor in self.tensors)
        self._buffers = [{key: part_here(buffer) for key, buffer in named.items()} for named in self._buffers]
        return self

    @property
    def is_plain(self) -> bool:
        """Whether nothing happens to either operand any more."""
        return len(self.stages) + len(self.inputs) == 0  # compiled code knows no truth of tuples

    @property
    def has_product(self) -> bool:
        """Whether the matmul has a leaner way than through the staged weight (`Stage.product`)."""
        first, *rest = self._after_decoding or (None,)
        if first is None or not first.has_product or len(self.inputs) > 0 or len(rest) > 1:
            return False
        return len(rest) == 0 or (rest[0].learned_grid() is not None and self.tensors[0].is_floating_point())

    def product(self, tokens: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by that way. It is not computed again in backward, so stages give their state as it is now."""
        first, *rest = self._after_decoding
        grid = rest[0].learned_grid() if rest else None
        return first.product(tokens, self.tensors[0], bias, grid, self._decode)

    @property
    def is_decoded_only(self) -> bool:
        """Whether all that happens to either operand is that a frozen weight is decoded."""
        return self._decode is not None and len(self.stages) + len(self.inputs) == 1

    @property
    def _after_decoding(self) -> tuple[Stage, ...]:
        return self.stages if self._decode is None else self.stages[1:]

    @property
    def _decode(self) -> Decode | None:
        return self.stages[0].decoder() if len(self.stages) > 0 else None

    def bound(self, tensors: Sequence[Tensor]) -> Bound:
        """Return the stages as functions of `tensors`, which stand for `self.tensors`."""
        weight, *rest = tensors
        functions: list[Callable[[Tensor], Tensor]] = []
        backward: list[Callable[[Tensor], Tensor] | None] = []
        for stage, keys, buffers in zip((*self.stages, *self.inputs), self._keys, self._buffers, strict=True):
            state, rest = {**buffers, **dict(zip(keys, rest, strict=False))}, rest[len(keys) :]
            functions.append(_with_state(stage, state, "forward"))
            other = isinstance(stage, Stage) and stage.has_backward_weight
            backward.append(_with_state(stage, state, "for_backward") if other else None)
        return Bound(weight, functions, backward, len(self.stages), self.inputs)


@dataclass(frozen=True)
class Bound:
    """The operands of one matmul, from captured tensors."""

    raw_weight: Tensor
    _functions: Sequence[Callable[[Tensor], Tensor]]
    _backward: Sequence[Callable[[Tensor], Tensor] | None]
    _num_stages: int
    _inputs: Sequence[InputStage]

    def weight(self) -> Tensor:
        """The weight of the forward matmul."""
        weight = self.raw_weight
        for function in self._functions[: self._num_stages]:
            weight = function(weight)
        return weight

    def backward_weight(self) -> Tensor | None:
        """The weight that the gradient of the input is multiplied with; None where it is the forward's."""
        if not any(self._backward):
            return None
        with torch.no_grad():
            weight = self.raw_weight
            for function, other in zip(
                self._functions[: self._num_stages], self._backward[: self._num_stages], strict=True
            ):
                weight = (other or function)(weight)
        return weight

    def tokens(self, tokens: Tensor) -> Tensor:
        """The activations that enter the matmul."""
        for function in self._functions[self._num_stages :]:
            tokens = function(tokens)
        return tokens

    def product(self, product: Tensor) -> Tensor:
        """What the matmul gave, its gradient being what stages of the activations make of it."""
        for stage in reversed(self._inputs):
            product = stage.on_product(product)
        return product


def _with_state(stage: nn.Module, state: dict[str, Tensor], method: str) -> Callable[[Tensor], Tensor]:
    if method == "forward":
        return (lambda x: functional_call(stage, state, (x,))) if state else stage  # type: ignore[no-any-return]
    if not state:
        return getattr(stage, method)  # type: ignore[no-any-return]
    return lambda x: functional_call(_Method(stage, method), {f"stage.{k}": v for k, v in state.items()}, (x,))  # type: ignore[no-any-return]


class _Method(nn.Module):
    """Calls another method of a module where `functional_call` calls forward."""

    def __init__(self, stage: nn.Module, method: str) -> None:
        super().__init__()
        self.stage, self.method = stage, method

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.stage, self.method)(x)  # type: ignore[no-any-return]
