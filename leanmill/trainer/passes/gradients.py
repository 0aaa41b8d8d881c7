"""Gradients on calibration rows, of a mixture's experts or of linear weights; for these a whole model is held."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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


def weight_sensitivities(
    model: ModelConfig, batches: Sequence[Mapping[str, Tensor]], ranks: Ranks, names: Collection[str]
) -> dict[str, Tensor]:
    """Return the mean over calibration rows of the squared gradient of a row's mean loss [out, in] fp32, on the CPU.

    Equal on all ranks. Takes memory for the model in fp32 and once more for the named weights.

    Args:
        model: Names a folder.
        batches: This rank's calibration rows, as many as on each other rank.
        ranks: Which process this is.
        names: Linear layers.
    """
    loaded: Any = load_weights(model, dtype=torch.float32).to(ranks.device).eval()
    loaded.requires_grad_(False)  # noqa: FBT003
    sums = {name: torch.zeros_like(loaded.get_submodule(name).weight, device="cpu") for name in sorted(names)}

    def square(total: Tensor, parameter: Tensor) -> None:
        assert parameter.grad is not None
        total += parameter.grad.square().cpu()
        parameter.grad = None

    for name, total in sums.items():
        weight = loaded.get_submodule(name).weight.requires_grad_()
        weight.register_post_accumulate_grad_hook(lambda parameter, total=total: square(total, parameter))
    num_rows = 0
    for batch in batches:
        for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
            ids, positions = ids.to(ranks.device)[None], positions.to(ranks.device)[None]
            logits = loaded(input_ids=ids, position_ids=positions, use_cache=False).logits
            F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
            num_rows += 1
    return {name: sum_over_ranks(total) / (num_rows * ranks.world_size) for name, total in sums.items()}


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
