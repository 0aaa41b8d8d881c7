"""Layers that keep their weight `[in, out]` (transformers' `Conv1D`, in GPT-2) as linear layers `[out, in]`.

Everything here reads weights `[out, in]`: groups of N:M lie along the last dim, scales belong to rows. A model of such
a family trains with linear layers in the place of its own, under the same names; what others read (a folder, the model
that `fold` returns) has the family's own layers again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


NOT_LINEAR = (
    "the layers of its family are no nn.Linear, and the format has a form for those only; use --to packed or hf"
)
"""Why a format of other libraries does not hold such a model."""
_NAMES = "layers_of_transposed_weights"


@torch.no_grad()
def as_linears(model: Any) -> Any:
    """Put a linear layer in the place of each layer that keeps its weight `[in, out]`, in place; return the model."""
    from transformers.pytorch_utils import Conv1D

    found = [path for path, module in model.named_modules() if isinstance(module, Conv1D)]
    for path in found:
        theirs = model.get_submodule(path)
        num_in, num_out = theirs.weight.shape
        layer = nn.Linear(num_in, num_out, bias=True, device="meta")
        layer.weight, layer.bias = _turned(theirs.weight), theirs.bias
        _put(model, path, layer.train(theirs.training))
    if found:
        vars(model)[_NAMES] = frozenset(found)
    return model


@torch.no_grad()
def as_stored(model: Any) -> Any:
    """Put the family's own layers back, in place; return the model.

    A layer that something wraps or stages stays what it is.
    """
    from transformers.pytorch_utils import Conv1D

    for path in vars(model).pop(_NAMES, ()):
        ours = model.get_submodule(path)
        if type(ours) is nn.Linear:
            with torch.device("meta"):
                layer = Conv1D(ours.out_features, ours.in_features)
            layer.weight, layer.bias = _turned(ours.weight), ours.bias
            _put(model, path, layer.train(ours.training))
    return model


def transposed_weights(model: Any) -> frozenset[str]:
    """Names of the weights that the model's family stores `[in, out]` and this model has `[out, in]`."""
    return frozenset(f"{path}.weight" for path in vars(model).get(_NAMES, ()))


def _turned(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.t().contiguous(), weight.requires_grad)


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
