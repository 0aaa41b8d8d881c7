"""Public entry: `staged_linear`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from leanmill.kernels.sharded import is_dtensor
from leanmill.kernels.staged_linear import naive


logger = logging.getLogger(__name__)
StageFunction = Callable[..., Tensor]


def staged_linear(x: Tensor, weight: Tensor, bias: Tensor | None, stage: StageFunction, *parameters: Tensor) -> Tensor:
    """Return x @ stage(weight, *parameters)^T + bias, keeping only the arguments for backward.

    Backward runs the stage again, takes dX = dY Ws and dWs = dY^T X, and sends dWs through the
    stage's own autograd to the weight and the parameters. Kept alive between forward and backward
    are x, the weight and the parameters themselves, as a plain linear keeps x and its weight, so
    engines that free gathered weights after forward and gather them again for backward work as with
    a plain linear. Gradients add up in `.grad` as usual; second derivatives are not available.

    Args:
        x: [..., in].
        weight: The raw weight [out, in], or whatever the stage takes.
        bias: [out] or None.
        stage: Deterministic, returns [out, in]. Runs once in forward and once more in backward, under
            the same autocast mode. Whatever it uses that needs a gradient must be among `parameters`.
        *parameters: Further tensors for the stage; those that need gradients get them.

    Returns:
        [..., out].

    Raises:
        ValueError: The staged weight does not fit x or bias, or a sharded argument is mixed with plain
            ones. In backward: the stage uses a tensor that needs a gradient and was not passed.
    """
    tensors = [t for t in (x, weight, bias, *parameters) if t is not None]
    sharded = [is_dtensor(t) for t in tensors]
    if any(sharded) and not all(sharded):
        raise ValueError(
            f"DTensors and plain tensors are mixed (sharded: {sharded}, of x, weight, bias and parameters); "
            f"give all in the same form, or use the gathered parameters that the engine passes to forward"
        )
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return naive.staged_linear(x, weight, bias, stage, *parameters)
    if torch.compiler.is_compiling():
        # The compiler knows how to recompute a checkpoint, but not gradients inside of a backward.
        compiled: Tensor = checkpoint(
            naive.staged_linear, x, weight, bias, stage, *parameters, use_reentrant=False, preserve_rng_state=False
        )
        return compiled
    _log_once("recomputation in its own backward")
    output: Tensor = _StagedLinear.apply(stage, x, weight, bias, *parameters)
    return output


class _StagedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stage: StageFunction, x: Tensor, weight: Tensor, bias: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        ctx.stage, ctx.device_type = stage, x.device.type
        ctx.autocast_dtype = (
            torch.get_autocast_dtype(ctx.device_type) if torch.is_autocast_enabled(ctx.device_type) else None
        )
        ctx.save_for_backward(x, weight, bias, *parameters)
        with _same_autocast(ctx):
            staged = stage(weight, *parameters)
            _check_shapes(x, staged, bias)
            return F.linear(x, staged, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *parameters = ctx.saved_tensors
        _, needs_x, *needs = ctx.needs_input_grad
        needs_bias = needs.pop(1)
        # Leaves of a graph of their own, so that the vjp stops here.
        inputs = [
            tensor.detach().requires_grad_(needed) for tensor, needed in zip((weight, *parameters), needs, strict=True)
        ]
        with torch.enable_grad(), _same_autocast(ctx):
            staged = ctx.stage(*inputs)
        grad_x = None
        if needs_x:
            grad_x = grad.matmul(staged.detach().to(grad.dtype)).to(x.dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_bias = rows.sum(0).to(bias.dtype) if needs_bias else None
        through: list[Tensor | None] = [None] * len(inputs)
        if any(needs):
            grad_staged = rows.t().matmul(x.reshape(-1, x.shape[-1]).to(grad.dtype)).to(staged.dtype)
            through = _vjp(staged, inputs, grad_staged)
        return None, grad_x, through[0], grad_bias, *through[1:]


def _vjp(staged: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor | None]:
    """Gradients of the inputs that need one; None for the rest."""
    _refuse_other_leaves(staged, inputs)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    if not staged.requires_grad:
        return [None] * len(inputs)
    found = iter(torch.autograd.grad(staged, wanted, grad, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]


def _refuse_other_leaves(staged: Tensor, inputs: list[Tensor]) -> None:
    """Raise if the stage used a leaf that needs a gradient and was not passed: it would get none."""
    known = {id(tensor) for tensor in inputs}
    waiting, seen = [staged.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ValueError(
                f"the stage uses a tensor {tuple(leaf.shape)} that needs a gradient and was not passed; "
                f"pass it: staged_linear(x, weight, bias, stage, *parameters)"
            )
        waiting.extend(function for function, _ in node.next_functions)


def _check_shapes(x: Tensor, staged: Tensor, bias: Tensor | None) -> None:
    if staged.dim() != 2 or x.dim() == 0 or x.shape[-1] != staged.shape[1]:
        raise ValueError(
            f"the staged weight {tuple(staged.shape)} does not fit x {tuple(x.shape)}; "
            f"it must be [out, in] with in = {x.shape[-1] if x.dim() else '?'}"
        )
    if bias is not None and bias.shape != staged.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit the staged weight {tuple(staged.shape)}; need [out]")


def _same_autocast(ctx: Any) -> AbstractContextManager[Any]:
    """The forward's autocast mode, without its cache.

    A cast that is cached without gradients, as inside a Function's forward, would be given to later
    users that need them.
    """
    if ctx.autocast_dtype is None:
        # Backward runs on another thread or outside of the context, where autocast may be on or off.
        return torch.autocast(ctx.device_type, enabled=False) if ctx.device_type != "meta" else nullcontext()
    return torch.autocast(ctx.device_type, dtype=ctx.autocast_dtype, cache_enabled=False)


@functools.cache
def _log_once(path: str) -> None:
    logger.debug("staged_linear: %s", path)
