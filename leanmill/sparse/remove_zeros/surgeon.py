"""Which heads and neurons do nothing."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from leanmill.core.surgery import CalibratedModel
from leanmill.sparse.structured.uneven import Chosen, UnevenSurgeon, query_heads_of
from leanmill.sparse.structured.widths import Widths


class ZerosSurgeon(UnevenSurgeon):
    """Cuts out what is zero; see `RemoveZeros`."""

    technique: ClassVar[str] = "remove_zeros"

    def expected(self) -> Widths:
        return self.widths

    def choose(self, model: CalibratedModel) -> Chosen:
        heads: list[Tensor] = []
        groups: list[Tensor] = []
        neurons: list[Tensor] = []
        none = torch.zeros(0, dtype=torch.int64)
        for block in model.blocks():
            number, shared = self.widths.groups[block.index], 0
            if number:
                shared = self.widths.heads[block.index] // number
                groups.append(alive_groups(block.module.get_submodule("self_attn"), number).nonzero().flatten().cpu())
            else:
                groups.append(none)
            heads.append(query_heads_of(groups[-1], shared))
            has_mlp = self.widths.neurons[block.index] > 0
            neurons.append(
                alive_neurons(block.module.get_submodule("mlp")).nonzero().flatten().cpu() if has_mlp else none
            )
        return Chosen(heads=heads, groups=groups, neurons=neurons)


def alive_groups(attention: nn.Module, number: int) -> Tensor:
    """Return which key-value heads stay [groups]: with values and a way on for them, or the first one for a bias."""
    on = _columns(attention, "o_proj").view(number, -1).any(1)
    return _with_bias(attention, "o_proj", on & _rows(attention, "v_proj").view(number, -1).any(1))


def alive_neurons(mlp: nn.Module) -> Tensor:
    """Return which neurons stay [neurons]: those that put something out, or the first one for a bias."""
    return _with_bias(mlp, "down_proj", _columns(mlp, "down_proj") & _rows(mlp, "up_proj"))


def _with_bias(module: nn.Module, output: str, alive: Tensor) -> Tensor:
    """A half that goes altogether takes its output's bias along, so where that is not zero the first part stays."""
    bias = getattr(module.get_submodule(output), "bias", None)
    if not alive.any() and bias is not None and bias.any():
        alive[0] = True
    return alive


def _columns(module: nn.Module, name: str) -> Tensor:
    return module.get_parameter(f"{name}.weight").ne(0).any(0)


def _rows(module: nn.Module, name: str) -> Tensor:
    found = module.get_parameter(f"{name}.weight").ne(0).any(1)
    bias = getattr(module.get_submodule(name), "bias", None)
    return found if bias is None else found | bias.ne(0)
