"""A model folder and calibration rows, as a pass that looks before it operates sees them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import ConfigError
from leanmill.core.places import find_modules
from leanmill.core.surgery import Measure, Part, SeenBlock
from leanmill.models.config import ModelConfig
from leanmill.models.pretrained import load_weights
from leanmill.parallel.collectives import sum_over_ranks
from leanmill.trainer.passes.folder import SourceFolder
from leanmill.trainer.passes.stream import Block, BlockStream


_VARIANTS_AT_ONCE = 8
"""Models without some parts whose hidden states wait between blocks together."""
_Hidden = list[Tensor]
_NOTHING: frozenset[Part] = frozenset()


class Calibrated:
    """Sends calibration rows through a model, a block in memory at a time; see `CalibratedModel`.

    Args:
        source: The model's folder.
        config: Names that folder.
        rows: This rank's batches, as many as on each other rank.
        device: Where blocks compute.
        dtype: What they compute in.
    """

    def __init__(
        self,
        source: SourceFolder,
        config: ModelConfig,
        rows: Sequence[Mapping[str, Tensor]],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.source, self.config, self.rows = source, config, rows
        self.device, self.dtype = device, dtype

    def blocks(self) -> Iterator[SeenBlock]:
        stream = self._stream()
        for block in stream.blocks():
            # Not advanced: running the block has put its outputs in the place of its inputs.
            yield SeenBlock(
                index=block.index,
                module=block.module,
                run=lambda block=block: _through(stream, block),  # type: ignore[misc]
                peek=lambda block=block: zip(stream.hidden, stream.run(block), strict=True),  # type: ignore[misc]
            )

    def without(self, skipped: Sequence[frozenset[Part]], measure: Measure = "loss") -> list[float]:
        # Variants that begin to differ late share what comes before.
        order = sorted(range(len(skipped)), key=lambda number: min(skipped[number], default=(0, "block")))
        found = [0.0] * len(skipped)
        for first in range(0, len(order), _VARIANTS_AT_ONCE):
            here = order[first : first + _VARIANTS_AT_ONCE]
            measured = self._measured([skipped[number] for number in here], measure)
            for number, value in zip(here, measured, strict=True):
                found[number] = value
        return found

    def whole(self) -> nn.Module:
        loaded: Any = load_weights(self.config, dtype=torch.float32).to(self.device).eval()
        return loaded.requires_grad_(False)  # type: ignore[no-any-return]  # noqa: FBT003

    def total(self, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor)

    def _stream(self) -> BlockStream:
        return BlockStream(self.source, self.config, self.rows, device=self.device, dtype=self.dtype)

    def _measured(self, skipped: Sequence[frozenset[Part]], measure: Measure) -> list[float]:
        stream = self._stream()
        halves = _halves(stream.model)
        wanted = {*skipped, *([] if measure == "loss" else [_NOTHING])}
        states: dict[frozenset[Part], _Hidden] = {_NOTHING: stream.hidden}
        for block in stream.blocks():
            after: dict[frozenset[Part], _Hidden] = {}
            for so_far in sorted({_until(parts, block.index) for parts in wanted}, key=sorted):
                before = states[_until(so_far, block.index - 1)]
                after[so_far] = list(_outputs(stream, block, before, so_far, halves))
            states = after
        sums = torch.zeros(len(skipped), 2, dtype=torch.float64)
        with stream.head() as logits:
            for number, batch in enumerate(self.rows):
                whole = logits(states[_NOTHING][number], batch) if measure != "loss" else None
                for row, parts in enumerate(skipped):
                    found = _measure(logits(states[parts][number], batch), whole, batch["input_ids"], measure)
                    sums[row] += torch.tensor([float(found.double().sum()), found.numel()])
        return [float(total / num_tokens) for total, num_tokens in sum_over_ranks(sums)]


def _measure(logits: Tensor, whole: Tensor | None, ids: Tensor, measure: Measure) -> Tensor:
    """The measure at each token, [B, S] or, of the loss, [B x (S - 1)]."""
    if whole is None:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(logits.device), reduction="none")
    if measure == "angle":
        return F.cosine_similarity(logits, whole, dim=-1).clamp(-1, 1).arccos() / torch.pi
    ours, theirs = logits.log_softmax(-1), whole.log_softmax(-1)
    mean = torch.logaddexp(ours, theirs) - math.log(2)
    return sum(F.kl_div(mean, one, reduction="none", log_target=True).sum(-1) for one in (ours, theirs)) / 2  # type: ignore[return-value]


def _through(stream: BlockStream, block: Block) -> Iterator[tuple[Tensor, Tensor]]:
    for number, out in enumerate(stream.run(block)):
        before, stream.hidden[number] = stream.hidden[number], out
        yield before, out


def _until(parts: frozenset[Part], index: int) -> frozenset[Part]:
    return frozenset(part for part in parts if part[0] <= index)


def _outputs(
    stream: BlockStream, block: Block, hidden: _Hidden, parts: frozenset[Part], halves: Mapping[Part, nn.Module]
) -> Iterator[Tensor]:
    here = {part for part in parts if part[0] == block.index}
    if (block.index, "block") in here:
        return iter(hidden)
    return _silenced(stream, block, hidden, [_half(halves, part) for part in sorted(here)])


def _silenced(stream: BlockStream, block: Block, hidden: _Hidden, modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    with _silent(modules):
        yield from stream.run(block, hidden)


def _half(halves: Mapping[Part, nn.Module], part: Part) -> nn.Module:
    if part not in halves:
        raise ConfigError(
            f"layer {part[0]} has no {part[1]} that can be told apart; choose another family, such as llama"
        )
    return halves[part]


def _halves(model: nn.Module) -> dict[Part, nn.Module]:
    return {
        (layer, kind): module
        for kind in ("attention", "mlp")
        for _, layer, module in find_modules(model, kind)  # type: ignore[arg-type]
        if layer is not None
    }


@contextmanager
def _silent(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Have modules return zeros in place of hidden states."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)
        yield
