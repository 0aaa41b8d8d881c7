"""How much inputs of a layer fluctuate, and biases in the place of those that go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from leanmill.sparse.structured.importance import HEADS, NEURONS


BIASES = {
    HEADS: ("attention_bias", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", HEADS)),
    NEURONS: ("mlp_bias", ("mlp.gate_proj", "mlp.up_proj", NEURONS)),
}
"""By what a part is written with: the setting that gives it biases, and the layers that then have one."""


def fluctuation(variance: Tensor, weight: Tensor) -> Tensor:
    """Return for each input of a layer its variance times the squared norm of its column (FLAP's WIFV) [in].

    Args:
        variance: Of each input over calibration tokens [in].
        weight: [out, in].
    """
    return variance * weight.square().sum(0)


def replaced(weight: Tensor, mean: Tensor, kept: Tensor) -> Tensor:
    """Return what inputs that go add on average to what a layer puts out [out].

    Args:
        weight: [out, in].
        mean: Of each input [in].
        kept: Indices of the inputs that stay.
    """
    gone = torch.ones_like(mean, dtype=torch.bool)
    gone[kept] = False
    return weight[:, gone] @ mean[gone]


def with_biases(
    tensors: Iterable[tuple[str, Tensor]], names: frozenset[str], biases: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a block, and biases of the layers of those halves that are cut.

    Args:
        tensors: Of the block as it is cut, by name relative to it.
        names: Of those there were.
        biases: What is added to what a half puts out [hidden], by the name of its last layer; its other layers get
            biases of zeros.
    """
    rows = {}
    for name, tensor in tensors:
        layer, _, kind = name.rpartition(".")
        rows[layer] = (len(tensor), tensor.dtype)
        bias = biases.get(layer) if kind == "bias" else None
        # One that was not there before is zeros of the family's making, and comes below.
        if kind != "bias" or name in names:
            yield name, tensor if bias is None else (tensor.double() + bias).to(tensor.dtype)
    for part, bias in biases.items():
        for layer in BIASES[part][1]:
            if f"{layer}.bias" not in names:
                size, dtype = rows[layer]
                yield f"{layer}.bias", (bias if layer == part else torch.zeros(size)).to(dtype)
