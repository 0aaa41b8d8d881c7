"""N:M masks, projections with their straight-through gradients, and the compressed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanmill.kernels.dispatch import choose, implementation
from leanmill.kernels.nm_mask import cpu, naive
from leanmill.kernels.nm_mask.checks import check_compressed, check_decay, check_plain, check_weight
from leanmill.kernels.sharded import on_local_rows


def nm_mask(weight: Tensor, num_kept: int = 2, group_size: int = 4, *, transposable: bool = False) -> Tensor:
    """Return a bool mask [..., in], true for the `num_kept` largest magnitudes of each group.

    Args:
        weight: Floating [..., in], where `group_size` divides `in`; may be a DTensor of whole rows.
        num_kept: Entries kept of each group, N of "N:M".
        group_size: Neighbours along the last dim in a group, M of "N:M"; at most 256.
        transposable: Instead keep two of every row and of every column of each 4 x 4 tile of
            [..., out, in], so that W and its transpose are both 2:4 (Hu et al. 2024,
            arXiv:2404.01847): of the 90 ways, that with the largest sum of magnitudes.

    Returns:
        The mask: ties keep the lower index, -0.0 ties with 0.0, NaN counts as larger than infinity,
        and every group keeps exactly `num_kept`. Transposable: `naive.tile_mask` states sums and ties.

    Raises:
        ValueError: The weight, its shape or the pattern is not one of these.
    """
    check_weight(weight, num_kept, group_size, transposable)
    return on_local_rows(
        lambda local: _nm_mask(local, num_kept, group_size, transposable), weight, num_row_dims=1 + transposable
    )


def nm_project(
    weight: Tensor,
    num_kept: int = 2,
    group_size: int = 4,
    *,
    decay: Tensor | None = None,
    spend_decay: bool = False,
    transposable: bool = False,
) -> Tensor:
    """Return `weight` with 0.0 for all entries that `nm_mask` prunes, in one pass.

    The gradient is straight-through: g, the gradient of what is returned, or with `decay`

        dL/dW = g + decay * (1 - M) * W

    (SR-STE, Zhou et al. 2021, arXiv:2102.04010, eq. 9), in fp32 (fp64 for fp64) and rounded once. Backward
    recomputes the mask from the weight, so no more than a reference to the weight is kept, and not
    even that without `decay`.

    Args:
        weight: Floating [..., in], where `group_size` divides `in`; may be a DTensor of whole rows.
        num_kept: Entries kept of each group, N of "N:M".
        group_size: Neighbours along the last dim in a group, M of "N:M"; at most 256.
        decay: Strength of the decay of pruned entries, a floating tensor of one element on the
            weight's device, so that a schedule may change it without a new graph. It gets no gradient, and
            backward reads it as it then is.
        spend_decay: Set `decay` to zero once a backward has added it: however many projections share it
            and however often each is called, it counts once until it is filled again.
        transposable: The mask is that of `nm_mask(..., transposable=True)`.

    Returns:
        [..., in] in the weight's dtype. Entries are selected, not multiplied: a pruned infinity or
        NaN gives 0.0, and so does a pruned negative number.

    Raises:
        ValueError: The weight, its shape, the pattern or `decay` is not one of these.
    """
    check_weight(weight, num_kept, group_size, transposable)
    if decay is not None:
        check_decay(decay, weight)
        decay = decay.detach()
    return on_local_rows(
        lambda local: _nm_project(local, decay, num_kept, group_size, transposable, spend_decay),
        weight,
        num_row_dims=1 + transposable,
    )


def nm_compress(weight: Tensor, num_kept: int = 2, group_size: int = 4) -> tuple[Tensor, Tensor]:
    """Return the kept entries of `nm_mask` in order, and where they stood.

    Args:
        weight: Floating [..., in], where `group_size` divides `in`.
        num_kept: Entries kept of each group, N of "N:M".
        group_size: Neighbours along the last dim in a group, M of "N:M"; at most 256.

    Returns:
        Values [..., in * N / M] in the weight's dtype, and uint8 [..., bytes] with the index of each
        value within its group: 1 bit for M = 2, 2 bits for M <= 4, 4 for M <= 16 and 8 above, the
        first in a byte's lowest bits, each row padded with zeros to whole bytes. The gradient of the
        values goes to the entries they came from.

    Raises:
        ValueError: The weight, its shape or the pattern is not one of these.
    """
    check_weight(weight, num_kept, group_size)
    check_plain(weight, "weight")
    return _nm_compress(weight, num_kept, group_size)  # type: ignore[no-any-return]


def nm_expand(values: Tensor, indices: Tensor, num_kept: int = 2, group_size: int = 4) -> Tensor:
    """Undo `nm_compress`: return `nm_project(weight, num_kept, group_size)`, differentiable in `values`.

    Args:
        values: Kept entries [..., in * N / M].
        indices: Their packed indices, uint8 [..., bytes], below `group_size` and rising within a group.
        num_kept: Entries kept of each group, N of "N:M".
        group_size: Neighbours along the last dim in a group, M of "N:M"; at most 256.

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    check_plain(values, "values")
    check_compressed(values, indices, num_kept, group_size)
    return _nm_expand(values, indices, num_kept, group_size)  # type: ignore[no-any-return]


def to_semi_structured(weight: Tensor) -> Tensor:
    """Return the 2:4 projection of a CUDA weight [out, in] in the layout of torch's sparse matmuls.

    Raises:
        ValueError: The weight is not on a GPU, or its shape or dtype is not one that torch's layout takes.
    """
    check_weight(weight, 2, 4)
    check_plain(weight, "weight")
    if weight.device.type != "cuda" or weight.dim() != 2:
        raise ValueError(
            f"a weight {list(weight.shape)} on {weight.device} has no semi-structured layout; allowed: [out, in] on a "
            f"CUDA device of compute capability 8.0 or later; nm_compress and nm_expand work anywhere"
        )
    from torch.sparse import to_sparse_semi_structured

    try:
        return to_sparse_semi_structured(nm_project(weight.detach(), 2, 4))  # type: ignore[no-any-return]
    except RuntimeError as error:
        raise ValueError(
            f"torch's semi-structured layout does not take a weight {list(weight.shape)} of {weight.dtype} "
            f"on {torch.cuda.get_device_name(weight.device)}: {str(error).splitlines()[0]}"
        ) from error


def path_of(op: str, tensor: Tensor) -> Any:
    """Return the module whose functions do `op` on this tensor's device and dtype."""
    return implementation(__package__, choose(op, tensor, c=cpu.library))


@torch.library.custom_op("leanmill::nm_mask", mutates_args=())
def _nm_mask(weight: Tensor, num_kept: int, group_size: int, transposable: bool) -> Tensor:
    return path_of("nm_mask", weight).nm_mask(weight, num_kept, group_size, transposable)  # type: ignore[no-any-return]


@_nm_mask.register_fake
def _(weight: Tensor, num_kept: int, group_size: int, transposable: bool) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.bool)


@torch.library.custom_op("leanmill::nm_project", mutates_args=())
def _nm_project(
    weight: Tensor, decay: Tensor | None, num_kept: int, group_size: int, transposable: bool, spend_decay: bool
) -> Tensor:
    return path_of("nm_project", weight).project(weight, num_kept, group_size, transposable)  # type: ignore[no-any-return]


@_nm_project.register_fake
def _(
    weight: Tensor, decay: Tensor | None, num_kept: int, group_size: int, transposable: bool, spend_decay: bool
) -> Tensor:
    return weight.new_empty(weight.shape)


@torch.library.custom_op("leanmill::nm_decayed_grad", mutates_args=())
def _nm_decayed_grad(
    grad: Tensor, weight: Tensor, decay: Tensor, num_kept: int, group_size: int, transposable: bool
) -> Tensor:
    return path_of("nm_decayed_grad", weight).decayed_grad(grad, weight, decay, num_kept, group_size, transposable)  # type: ignore[no-any-return]


@_nm_decayed_grad.register_fake
def _(grad: Tensor, weight: Tensor, decay: Tensor, num_kept: int, group_size: int, transposable: bool) -> Tensor:
    return weight.new_empty(weight.shape)


@torch.library.custom_op("leanmill::nm_compress", mutates_args=())
def _nm_compress(weight: Tensor, num_kept: int, group_size: int) -> tuple[Tensor, Tensor]:
    return path_of("nm_compress", weight).compress(weight, num_kept, group_size)  # type: ignore[no-any-return]


@_nm_compress.register_fake
def _(weight: Tensor, num_kept: int, group_size: int) -> tuple[Tensor, Tensor]:
    num_values = weight.shape[-1] // group_size * num_kept
    width = naive.packed_width(num_values, group_size)
    indices = weight.new_empty(*weight.shape[:-1], width, dtype=torch.uint8)
    return weight.new_empty(*weight.shape[:-1], num_values), indices


@torch.library.custom_op("leanmill::nm_expand", mutates_args=())
def _nm_expand(values: Tensor, indices: Tensor, num_kept: int, group_size: int) -> Tensor:
    return path_of("nm_expand", values).expand(values, indices, num_kept, group_size)  # type: ignore[no-any-return]


@_nm_expand.register_fake
def _(values: Tensor, indices: Tensor, num_kept: int, group_size: int) -> Tensor:
    return values.new_empty(*values.shape[:-1], values.shape[-1] // num_kept * group_size)


def _save_for_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ctx.decay, *ctx.pattern, ctx.spends_decay = inputs
    if ctx.decay is not None:
        ctx.save_for_backward(weight)


def _project_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    if ctx.decay is not None:
        # Not among the saved tensors: those must not change, and backward wants today's value.
        (weight,) = ctx.saved_tensors
        grad = _nm_decayed_grad(grad, weight, ctx.decay, *ctx.pattern)
        if ctx.spends_decay:
            ctx.decay.zero_()
    return grad, None, None, None, None, None


def _save_for_compress(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, *ctx.pattern = inputs
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _compress_backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, None, None]:
    return nm_expand(grad, *ctx.saved_tensors, *ctx.pattern), None, None


def _save_for_expand(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, indices, *ctx.pattern = inputs
    ctx.save_for_backward(indices)


def _expand_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return naive.gather(grad, *ctx.saved_tensors, *ctx.pattern), None, None, None


_nm_project.register_autograd(_project_backward, setup_context=_save_for_project)
_nm_compress.register_autograd(_compress_backward, setup_context=_save_for_compress)
_nm_expand.register_autograd(_expand_backward, setup_context=_save_for_expand)
