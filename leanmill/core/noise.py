"""Random numbers that are a function of (seed, name, step, element), with no generator and no state.

An element's number is a hash of a key, which holds seed, name and step, and of where the element stands
in the whole tensor. So recomputation draws what forward drew, a shard draws its part of what one process
draws, and neither device, dtype, order nor the number of ranks changes anything: the hash is integer
arithmetic, and `uniform` is bitwise the same on CPUs and GPUs, in eager and compiled code. What `gumbel`
and `normal` make of it agrees up to the rounding of `log` and `erfinv`.

Within an optimizer step a key stays the same, in every micro-batch. Who wants other numbers in each hands
in indices that tell micro-batches apart, such as those of the global batch's rows.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.core.rules import StepContext, StepRule
from leanmill.kernels.sharded import is_dtensor


_UNSET = -1


def derive_seed(*parts: int | str) -> int:
    """Hash `parts` to a seed in [0, 2^63); neighbouring inputs give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Noise(nn.Module):
    """A source of random numbers that a stage or place owns; `FreshNoise` gives it a key every step.

    Without a key, all it draws is NaN.

    Args:
        name: Tells sources apart: two of one name draw the same. A technique uses its own name and the site's.
    """

    first_row: int
    """Where the first row of what is drawn for stands in the whole tensor: of experts, a rank may hold some."""
    key: Tensor
    """(1,) int64: the hash of seed, name and step. A buffer, so that a compiled block reads it anew."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.first_row = 0
        # On the CPU even where weights are on meta: there it would lose its value.
        self.register_buffer("key", torch.full((1,), _UNSET, device="cpu"), persistent=False)

    def renew(self, seed: int, step: int) -> None:
        """Draw other numbers from now on."""
        self.key.fill_(derive_seed(seed, self.name, step))

    def uniform(self, like: Tensor) -> Tensor:
        """Return a number in [0, 1) for every element of `like`; see `uniform`."""
        return uniform(self.key, element_indices(like, self.first_row))

    def normal(self, like: Tensor) -> Tensor:
        """Return a standard normal number for every element of `like`; see `normal`."""
        return normal(self.key, element_indices(like, self.first_row))

    def gumbel(self, like: Tensor) -> Tensor:
        """Return a standard Gumbel number for every element of `like`; see `gumbel`."""
        return gumbel(self.key, element_indices(like, self.first_row))

    def extra_repr(self) -> str:
        return f"name={self.name!r}"


class FreshNoise(StepRule):
    """Gives every `Noise` of a model its key of the step.

    Args:
        model: Walked anew every step.
        seed: The run's.
        technique: Who draws, for the message.

    Raises:
        ConfigError: There is no seed.
    """

    def __init__(self, model: nn.Module, seed: int | None, technique: str) -> None:
        if seed is None:
            raise ConfigError(
                f"{technique} draws random numbers and was given no seed; set `seed: 0` in the recipe, or pass "
                f"seed=0 to InstallContext"
            )
        self.model, self.seed = model, seed

    def begin_step(self, context: StepContext) -> None:
        for module in self.model.modules():
            if isinstance(module, Noise):
                module.renew(self.seed, context.step)


def uniform(key: Tensor, indices: Tensor) -> Tensor:
    """Return numbers of [0, 1) on a grid of 2^-24.

    Args:
        key: (1,) int64 of [0, 2^63); NaN results from a negative one.
        indices: int64 or int32 of any shape, not negative: which elements. A DTensor gives a DTensor.

    Returns:
        fp32 of the shape of `indices`.
    """
    if is_dtensor(indices):
        return _spread(uniform(key, indices.to_local()), indices)  # type: ignore[attr-defined]
    spacing = torch.full_like(key, 2.0**-24, dtype=torch.float32).masked_fill(key < 0, torch.nan)
    return _hashed(key, indices).bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).to(torch.float32).mul_(spacing)


def normal(key: Tensor, indices: Tensor) -> Tensor:
    """Return standard normal numbers, fp32; as `uniform`. None is further from 0 than 5.4."""
    return _open_uniform(key, indices).mul_(2).sub_(1).erfinv_().mul_(2**0.5)


def gumbel(key: Tensor, indices: Tensor) -> Tensor:
    """Return standard Gumbel numbers -log(-log(u)), fp32; as `uniform`. All are of (-2.9, 16.7)."""
    return _open_uniform(key, indices).log_().neg_().log_().neg_()


def element_indices(like: Tensor, first_row: int = 0) -> Tensor:
    """Return where each element of `like` stands in the whole tensor, row by row.

    Args:
        like: Any shape; a DTensor, evenly sharded or not, gives a DTensor of the same placements.
        first_row: Of a plain tensor that is a part of the whole: where its first entry along dim 0 stands.

    Returns:
        int32 of the shape of `like`, int64 where that is too small.
    """
    first = first_row * like.shape[1:].numel() if first_row else 0
    dtype = torch.int32 if first + like.numel() < 2**31 else torch.int64
    if not is_dtensor(like):
        return torch.arange(first, first + like.numel(), device=like.device, dtype=dtype).reshape(like.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)  # type: ignore[attr-defined]
    device = like.to_local().device  # type: ignore[attr-defined]
    found = torch.zeros(shape, device=device, dtype=dtype)
    for dim, size in enumerate(shape):
        found.mul_(like.shape[dim])
        position = torch.arange(offset[dim], offset[dim] + size, device=device, dtype=dtype)
        found.add_(position.reshape(-1, *[1] * (len(shape) - dim - 1)))
    return _spread(found, like)


def _open_uniform(key: Tensor, indices: Tensor) -> Tensor:
    """Numbers of (0, 1): the middles of 2^23 equal parts, all exact in fp32."""
    if is_dtensor(indices):
        return _spread(_open_uniform(key, indices.to_local()), indices)  # type: ignore[attr-defined]
    spacing = torch.full_like(key, 2.0**-23, dtype=torch.float32).masked_fill(key < 0, torch.nan)
    number = _hashed(key, indices).bitwise_right_shift_(9).bitwise_and_(0x7FFFFF).to(torch.float32)
    return number.add_(0.5).mul_(spacing)


def _hashed(key: Tensor, indices: Tensor) -> Tensor:
    """32 well-mixed bits for each index, int32.

    Two rounds of 32-bit xor-shift-multiply hashes (constants from Wellons' hash-prospector), one for each
    half of the key, so that two keys do not draw the same numbers in another order. Products wrap.
    """
    low, high = (key & 0xFFFFFFFF).to(torch.int32), (key >> 32).to(torch.int32)
    mixed = _mixed(indices.to(torch.int32) ^ low, (16, 15, 15), (0x21F0AAAD, -0x2CA5D269)).bitwise_xor_(high)
    if indices.dtype == torch.int64:
        mixed.bitwise_xor_((indices >> 32).to(torch.int32).mul_(0x1E35A7BD))
    return _mixed(mixed, (16, 15, 16), (0x7FEB352D, -0x7B935975))


def _mixed(bits: Tensor, shifts: tuple[int, int, int], factors: tuple[int, int]) -> Tensor:
    for shift, factor in zip(shifts, (*factors, 1), strict=True):
        # An int32 is shifted with its sign; the mask takes that off again.
        bits = bits.bitwise_xor_((bits >> shift).bitwise_and_(2 ** (32 - shift) - 1))
        bits = bits if factor == 1 else bits.mul_(factor)
    return bits


def _spread(local: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    stride = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(
        local,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=like.shape,
        stride=stride,
    )
