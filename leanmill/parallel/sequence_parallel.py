"""Splitting tokens among the ranks that share matmuls (sequence parallelism, Korthikanti et al., arXiv:2205.05198).

Inside decoder blocks a rank of a tensor-parallel group has 1 / n of the tokens: of the residual stream, the norms and
what else works on one token at a time. A module with shared matmuls, here a region, gathers them where it begins and
gives each rank the sum for its own where it ends. That sum and the gather are the two halves of the sum over whole
tokens that ranks without this do, in forward and in backward.

As in the paper a region keeps for backward its own tokens, and gathers the others' again there. Otherwise than in it,
what stands outside of blocks (embedding, last norm, head) sees all tokens: whatever a family does there, and whichever
loss takes the place of the head, need not know.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F  # noqa: N812

from leanmill.core.around import Around, Call, Ring, put_around
from leanmill.core.blocks import decoder_blocks
from leanmill.core.branches import is_branched, plain_modules
from leanmill.core.errors import ConfigError
from leanmill.core.names import clean_name
from leanmill.core.places import is_norm
from leanmill.parallel.sequence_plan import sequence_problems
from leanmill.parallel.tensor_exchange import GroupSplit, TokenGather, TokenScatter, gathered
from leanmill.parallel.tensor_plan import Share


class TokenParts:
    """The tokens [B, S, H] of a forward, of which rank r of n has [r S / n, (r + 1) S / n).

    Lengths that n does not divide are filled up at the end, in forwards without gradients. With them they are refused:
    recomputation in backward would have to know which forward it repeats.

    Args:
        group: The ranks, in the order of their parts.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._split = GroupSplit(group, by_rows=True)
        self._length: int | None = None
        """Of rows that are filled up; None where none are."""

    def begin(self, hidden: Tensor) -> Tensor:
        """Return this rank's part of what all ranks have, [B, S / n, H]; its gradient is gathered.

        Raises:
            ConfigError: Its length does not divide, and gradients are wanted.
        """
        length = hidden.shape[1]
        self._length = length if length % self.group.size() else None
        if self._length is not None and torch.is_grad_enabled():
            raise ConfigError(
                f"layout.sequence_parallel: rows of {length} tokens cannot be split evenly over "
                f"layout.tp={self.group.size()} ranks; choose rows whose length it divides, or set "
                f"layout.sequence_parallel=false"
            )
        return self._split.part(self._filled_up(hidden), 1)

    def end(self, part: Tensor) -> Tensor:
        """Return all tokens, [B, S, H]; the gradient, equal on all ranks, is cut to this rank's part."""
        return self._without_filling(self._split.whole(part, 1))

    def gather(self, part: Tensor) -> Tensor:
        """Return all tokens, [B, S, H]; the gradient is the sum over ranks of what they give this rank's part."""
        return self._without_filling(TokenGather.apply(part, self.group))

    def gather_again(self, part: Tensor) -> Tensor:
        """Return what `gather` did, without a gradient."""
        return gathered(part, 1, self.group)

    def scatter(self, summand: Tensor) -> Tensor:
        """Return this rank's part [B, S / n, H] of the sum over ranks; the gradient is gathered, [B, S, H]."""
        return TokenScatter.apply(self._filled_up(summand), self.group)  # type: ignore[no-any-return]

    def _without_filling(self, tokens: Tensor) -> Tensor:
        return tokens if self._length is None else tokens[:, : self._length]

    def _filled_up(self, tokens: Tensor) -> Tensor:
        missing = -tokens.shape[1] % self.group.size()
        return F.pad(tokens, (0, 0, 0, missing)) if missing else tokens


class RegionSplit(GroupSplit):
    """How ranks share a weight inside a region: whole tokens come in, and each rank's own go out.

    Args:
        tokens: How ranks share tokens.
        by_rows: See `WeightSplit`.
        gathers_output: See `WeightSplit`.
        splits_input: See `WeightSplit`.
    """

    def __init__(
        self, tokens: TokenParts, *, by_rows: bool, gathers_output: bool = False, splits_input: bool = False
    ) -> None:
        super().__init__(tokens.group, by_rows=by_rows, gathers_output=gathers_output, splits_input=splits_input)
        self._tokens = tokens

    def enter(self, tensor: Tensor) -> Tensor:
        """Return it: gradients of all that a region computes are added up at once, where it gathers."""
        return tensor

    def total(self, tensor: Tensor) -> Tensor:
        """Return this rank's tokens of the sum; the gradient, of all tokens, comes from their ranks."""
        return self._tokens.scatter(tensor)


class _FirstBlock(Around):
    technique: ClassVar[str] = "sequence_parallel"
    ring: ClassVar[Ring] = Ring.TAP

    def __init__(self, tokens: TokenParts) -> None:
        super().__init__()
        self._tokens = tokens

    def forward(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        hidden, *others = args
        return call(self._tokens.begin(hidden), *others, **kwargs)


class _LastBlock(_FirstBlock):
    def forward(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        found = call(*args, **kwargs)
        return self._tokens.end(found) if isinstance(found, Tensor) else (self._tokens.end(found[0]), *found[1:])


class _Region(Around):
    """Gathers the tokens that a module with shared matmuls takes; its last matmul shares them out again."""

    technique: ClassVar[str] = "sequence_parallel"
    ring: ClassVar[Ring] = Ring.SCALE

    def __init__(self, tokens: TokenParts, name: str, block: nn.Module) -> None:
        super().__init__()
        self._tokens, self._name = tokens, name
        # Past nn.Module's registration, which would make a cycle of parents.
        self.__dict__["_block"] = block

    def forward(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        part = _as_multiplied(args[0] if args else kwargs[self._name])
        whole = self._tokens.gather(part)
        with self._keeping(part, whole):
            if args:
                return call(whole, *args[1:], **kwargs)
            return call(**{**kwargs, self._name: whole})

    def _keeping(self, part: Tensor, whole: Tensor) -> AbstractContextManager[Any]:
        """What a block recomputes it gathers then; its own hooks must see what is kept inside."""
        block: nn.Module = self.__dict__["_block"]
        recomputes = block.training and getattr(block, "gradient_checkpointing", False)
        if recomputes or not torch.is_grad_enabled():
            return nullcontext()
        kept = _KeptAsPart(self._tokens, part, whole)
        return saved_tensors_hooks(kept.pack, kept.unpack)


class _KeptAsPart:
    """Keeps for backward, in the place of gathered tokens, this rank's; the first that asks gathers them for all."""

    def __init__(self, tokens: TokenParts, part: Tensor, whole: Tensor) -> None:
        self._tokens, self._part = tokens, part.detach()
        self._where, self._numel, self._dtype = whole.data_ptr(), whole.numel(), whole.dtype
        self._num_waiting = 0
        self._again: Tensor | None = None

    def pack(self, tensor: Tensor) -> Any:
        is_it = tensor.data_ptr() == self._where and tensor.numel() == self._numel and tensor.dtype == self._dtype
        if not is_it or not tensor.is_contiguous():
            return tensor
        self._num_waiting += 1
        return tensor.shape

    def unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        again = self._again if self._again is not None else self._tokens.gather_again(self._part)
        self._num_waiting -= 1
        # A graph that is gone through twice asks once more, and gathers each time.
        self._again = again if self._num_waiting > 0 else None
        return again.view(kept)


def _as_multiplied(part: Tensor) -> Tensor:
    """Return tokens in the dtype that matmuls take them in: under autocast half the bytes to send and keep."""
    kind = part.device.type
    if torch.is_autocast_enabled(kind) and part.dtype == torch.float32:
        return part.to(torch.get_autocast_dtype(kind))
    return part


def split_tokens(model: Any, tokens: TokenParts, shares: Sequence[Share]) -> list[nn.Parameter]:
    """Let blocks hand on parts of the tokens, and their regions gather them.

    Args:
        model: The causal LM on the meta device.
        tokens: How.
        shares: What ranks share of it.

    Returns:
        The parameters of blocks that see a part of the tokens, biases in regions aside.

    Raises:
        ConfigError: Blocks of this model do more than that allows.
    """
    for problem in sequence_problems(model.config.get_text_config(), tokens.group.size()):
        raise ConfigError(problem)
    blocks = decoder_blocks(model)
    regions = _regions(model, blocks, shares)
    outside = list(_outside_regions(blocks, [region for _, region, _ in regions]))
    for name, region, block in regions:
        put_around(region, _Region(tokens, name, block))
    put_around(blocks[0], _FirstBlock(tokens))
    put_around(blocks[-1], _LastBlock(tokens))
    return outside


def region_shares(model: nn.Module, shares: Sequence[Share]) -> set[str]:
    """Return the paths of what ranks share inside decoder blocks."""
    inside = {id(module) for block in decoder_blocks(model) for module in block.modules()}
    return {share.path for share in shares if id(model.get_submodule(share.path)) in inside}


def _regions(
    model: nn.Module, blocks: Sequence[nn.Module], shares: Sequence[Share]
) -> list[tuple[str, nn.Module, nn.Module]]:
    """Return (its argument for tokens, region, its block) of every module that ends in a matmul by columns."""
    block_of = {id(module): block for block in blocks for module in block.modules()}
    inside = region_shares(model, shares)
    owners = dict.fromkeys(_owner(model, s.path) for s in shares if s.kind == "columns" and s.path in inside)
    for share in shares:
        if share.path in inside and sum(share.path.startswith(f"{owner}.") for owner in owners) != 1:
            raise ConfigError(
                f"layout.sequence_parallel: {share.name} is shared in no module that also shares out its result; set "
                f"layout.sequence_parallel=false"
            )
    found = []
    for owner in owners:
        region = model.get_submodule(owner)
        if any(region is block for block in blocks):
            raise ConfigError(
                f"layout.sequence_parallel: {clean_name(owner)} holds shared matmuls itself, beside what works on "
                f"single tokens; set layout.sequence_parallel=false"
            )
        name = list(inspect.signature(type(region).forward).parameters)[1]
        found.append((name, region, block_of[id(region)]))
    return found


def _owner(model: nn.Module, path: str) -> str:
    """Return the path of the plain module that a layer is in, past what wraps it with branches."""
    owner = path.rpartition(".")[0]
    return _owner(model, owner) if is_branched(model.get_submodule(owner)) else owner


def _outside_regions(blocks: Sequence[nn.Module], regions: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    """Yield the parameters of blocks outside of regions, all of norms."""
    inside = {id(module) for region in regions for module in region.modules()}
    for block in blocks:
        for path, module in plain_modules(block):
            own = [p for p in module._parameters.values() if p is not None]
            if id(module) in inside or not own:
                continue
            if not is_norm(module):
                raise ConfigError(
                    f"layout.sequence_parallel: {path or 'the block itself'} of a decoder block, a "
                    f"{type(module).__name__}, is no norm and shares no matmul; set layout.sequence_parallel=false"
                )
            yield from own
