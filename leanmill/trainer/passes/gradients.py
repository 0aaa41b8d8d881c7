"""Gradients on calibration rows, of a mixture's experts or of linear weights; for these a whole model is held."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.blocks import decoder_blocks
from leanmill.core.experts import is_stacked_experts, stacked_parameters
from leanmill.core.surgery import ExpertGradients
from leanmill.models.config import ModelConfig
from leanmill.models.pretrained import load_weights
from leanmill.parallel.collectives import sum_over_ranks
from leanmill.parallel.launch import Ranks


def expert_gradients(
    model: ModelConfig, batches: Sequence[Mapping[str, Tensor]], ranks: Ranks
) -> dict[int, ExpertGradients]:
    """Return what the experts of each layer and their gradients come to, by index of the block; equal on all ranks.

    Takes memory for the model in fp32 and once more for its experts.

    Args:
        model: Names a folder.
        batches: This rank's calibration rows, as many as on each other rank.
        ranks: Which process this is.
    """
    loaded: Any = load_weights(model, dtype=torch.float32).to(ranks.device).eval()
    loaded.requires_grad_(False)  # noqa: FBT003
    experts = {
        index: module
        for index, block in enumerate(decoder_blocks(loaded))
        for module in block.modules()
        if is_stacked_experts(module)
    }
    for module in experts.values():
        for name in stacked_parameters(module):
            module._parameters[name].requires_grad_()  # type: ignore[union-attr]
    for batch in batches:
        ids = batch["input_ids"].to(ranks.device)
        logits = loaded(input_ids=ids, position_ids=batch["position_ids"].to(ranks.device), use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        (loss / (len(batches) * ranks.world_size)).backward()
    return {index: _sizes(module) for index, module in experts.items()}


class WeightGradients:
    """Gradients of the mean loss of each calibration row; equal on all ranks. Takes memory for the model in fp32.

    Args:
        model: Names a folder.
        batches: This rank's calibration rows, as many as on each other rank.
        ranks: Which process this is.
    """

    def __init__(self, model: ModelConfig, batches: Sequence[Mapping[str, Tensor]], ranks: Ranks) -> None:
        self.batches, self.ranks = batches, ranks
        self.num_rows = sum(len(batch["input_ids"]) for batch in batches) * ranks.world_size
        self.loaded: Any = load_weights(model, dtype=torch.float32).to(ranks.device).eval()
        self.loaded.requires_grad_(False)  # noqa: FBT003

    def mean_squares(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return the means over rows of the squared gradients of linear layers [out, in], fp32 on the CPU."""
        sums = {name: torch.zeros(self._shape(name)) for name in sorted(names)}

        def add(name: str, row: int, gradient: Tensor) -> None:
            sums[name] += gradient.square().cpu()

        self._backward(names, add)
        return {name: sum_over_ranks(total) / self.num_rows for name, total in sums.items()}

    def of_each_row(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return the gradients of linear layers [rows, out, in], fp32 on the CPU, those of the first rank first."""
        found = {name: torch.zeros(self.num_rows, *self._shape(name)) for name in sorted(names)}
        first = self.ranks.rank * (self.num_rows // self.ranks.world_size)

        def put(name: str, row: int, gradient: Tensor) -> None:
            found[name][first + row] = gradient.cpu()

        self._backward(names, put)
        # Each row lies on one rank, so the sum is that row.
        return {name: sum_over_ranks(gradients) for name, gradients in found.items()}

    def _shape(self, name: str) -> torch.Size:
        return self.loaded.get_submodule(name).weight.shape  # type: ignore[no-any-return]

    def _backward(self, names: Collection[str], take: Callable[[str, int, Tensor], None]) -> None:
        """Show the gradient of every named layer in every row of this rank; none is kept."""
        if not names:  # a block of which nothing is solved: then the loss has no gradient at all
            return
        row = 0

        def see(name: str, parameter: Tensor) -> None:
            assert parameter.grad is not None
            take(name, row, parameter.grad)
            parameter.grad = None

        weights = {name: self.loaded.get_submodule(name).weight.requires_grad_() for name in names}
        hooks = [
            weight.register_post_accumulate_grad_hook(lambda parameter, name=name: see(name, parameter))
            for name, weight in weights.items()
        ]
        for batch in self.batches:
            for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
                ids, positions = ids.to(self.ranks.device)[None], positions.to(self.ranks.device)[None]
                logits = self.loaded(input_ids=ids, position_ids=positions, use_cache=False).logits
                F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
                row += 1
        for name, hook in zip(weights, hooks, strict=True):
            hook.remove()
            weights[name].requires_grad_(False)  # noqa: FBT003


@torch.no_grad()
def _sizes(module: nn.Module) -> ExpertGradients:
    totals: list[Tensor] = []
    for name in stacked_parameters(module):
        weight = getattr(module, name)
        gradient = torch.zeros_like(weight) if weight.grad is None else sum_over_ranks(weight.grad)
        weight.grad = None
        totals.append(torch.stack([_squares(gradient), _squares(weight)]))
    squared_gradient, squared_weight = torch.stack(totals).sum(0)
    return ExpertGradients(squared_gradient=squared_gradient, squared_weight=squared_weight)


def _squares(weight: Tensor) -> Tensor:
    return torch.stack([expert.double().square().sum() for expert in weight]).cpu()
