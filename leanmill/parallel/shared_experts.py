"""Shared experts, which take every token, computed while tokens travel to the others.

A block calls its routed and its shared experts one after the other, in either order, and nothing of it is
rewritten here. Where routed ones come first, the dispatch has the shared ones computed as soon as tokens have
set out, and the block's own call gets the result. Where shared ones come first, their call returns a tensor that
the dispatch fills; blocks look at it when both have been called. Backward mirrors it, by the order in which
autograd goes back: gradients of tokens travel while the shared experts' backward runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.around import Around, Ring, put_around
from leanmill.core.dispatch import MEANWHILE
from leanmill.core.errors import RunError
from leanmill.core.product import compute_dtype


_NAMES = ("shared_experts", "shared_expert", "shared_mlp")
"""What families call them."""


def overlap_shared_experts(block: nn.Module, experts: nn.Module) -> None:
    """Have the shared experts of `block`, if it has any, computed while tokens travel to `experts`, a child of it."""
    shared = next((child for name in _NAMES if (child := block._modules.get(name)) is not None), None)
    if shared is None or len(inspect.signature(type(shared).forward).parameters) != 2:
        return  # None, or they take more than hidden states, which are not there before the block's own call.
    turn = _Turn()
    put_around(block, _AroundBlock(turn, shared))
    put_around(shared, _AroundShared(turn))
    setattr(experts, MEANWHILE, turn.meanwhile)


class _Turn:
    """Whose turn it is in one call of a block. Closed outside of one: then everything runs where it is called."""

    def __init__(self) -> None:
        self.is_open = False

    def open(self, shared: nn.Module, hidden: Tensor) -> None:
        """A block begins with `hidden`."""
        self.is_open, self._runs_now = True, False
        self._shared, self._hidden = shared, hidden
        self._early: Tensor | None = None
        self._promised: tuple[Callable[..., Tensor], Tensor, Tensor] | None = None
        self._is_settled = False

    def close(self) -> None:
        """It has ended, or raised."""
        self.__dict__ = {"is_open": False}

    def meanwhile(self) -> None:
        """Compute the shared experts: tokens have set out."""
        if not self.is_open or self._is_settled:
            return
        self._is_settled = True
        if self._promised is None:
            self._runs_now = True
            self._early = self._shared.forward(self._hidden)
            self._runs_now = False
            return
        call, tokens, promised = self._promised
        value = call(tokens)
        if value.shape != promised.shape or value.dtype != promised.dtype:
            raise RunError(
                f"shared experts give {value.dtype} {list(value.shape)} where {promised.dtype} {list(promised.shape)} "
                f"was expected of them; set layout.ep=1 for this model"
            )
        promised.copy_(value)

    def call(self, call: Callable[..., Tensor], tokens: Tensor) -> Tensor:
        """Return what the block's own call of its shared experts gets."""
        if not self.is_open or self._runs_now:
            return call(tokens)
        if not self._is_settled:
            if _has_hooks(self._shared):
                self._is_settled = True  # nothing is left to do meanwhile
                return call(tokens)
            # Not a number, to be seen should a block look at it before it calls its routed experts.
            promised = tokens.new_full(tokens.shape, torch.nan, dtype=compute_dtype(tokens))
            self._promised = call, tokens, promised
            return promised
        if self._early is not None and _is_same(tokens, self._hidden):
            return self._early.view(tokens.shape)
        return call(tokens)


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at what `module` returns, or replaces it, as ZeRO-3 does: it must be there by then."""
    return any((module._forward_hooks, module._backward_hooks, module._backward_pre_hooks))


def _is_same(tokens: Tensor, hidden: Tensor) -> bool:
    """Whether both are the same rows, whatever their shape."""
    is_whole = tokens.is_contiguous() and hidden.is_contiguous() and tokens.numel() == hidden.numel()
    return tokens is hidden or (is_whole and tokens.dtype == hidden.dtype and tokens.data_ptr() == hidden.data_ptr())


class _AroundBlock(Around):
    """Opens a turn for each call of a block."""

    technique = "expert_parallel"
    ring = Ring.DECIDE

    def __init__(self, turn: _Turn, shared: nn.Module) -> None:
        super().__init__()
        # Past nn.Module's registration: the shared experts are the block's own.
        self.__dict__["_turn"], self.__dict__["_shared"] = turn, shared

    @torch.compiler.disable(recursive=False)  # type: ignore[misc]
    def forward(self, call: Callable[..., Any], /, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        turn: _Turn = self.__dict__["_turn"]
        turn.open(self.__dict__["_shared"], hidden)
        try:
            return call(hidden, *args, **kwargs)
        finally:
            turn.close()


class _AroundShared(Around):
    """Outermost, so that whatever else stands around the shared experts runs with them."""

    technique = "expert_parallel"
    ring = Ring.TAP

    def __init__(self, turn: _Turn) -> None:
        super().__init__()
        self.__dict__["_turn"] = turn

    @torch.compiler.disable(recursive=False)  # type: ignore[misc]
    def forward(self, call: Callable[..., Any], /, tokens: Tensor) -> Tensor:
        return self.__dict__["_turn"].call(call, tokens)  # type: ignore[no-any-return]
