"""Weights of a model as pairs of factors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.core.llama_like import LLAMA_LIKE, check_family, completed, own_config
from leanmill.core.surgery import CalibratedModel, LookingSurgeon, StoredBlock
from leanmill.peft_ext.welore.ranks import pair_ranks


_FAMILY = "pruned_llama"
_BY_LAYER = ("num_attention_heads_by_layer", "num_key_value_heads_by_layer", "intermediate_size_by_layer")
_MATRICES = ("linear_attention_by_layer", "linear_mlp_by_layer")
"""Which layers have a matrix in the place of attention or MLP; it stays as it is."""
_LINEARS = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)


class WeLoreSurgeon(LookingSurgeon):
    """Makes pairs; see `WeLore` for the arguments."""

    def __init__(self, *, rank_reduction: float, least_reduction: float) -> None:
        self.rank_reduction, self.least_reduction = rank_reduction, least_reduction
        self.before: Any = None
        self.after: Any = None
        self.ranks: dict[str, int] = {}
        """By layer and name, such as `3.mlp.up_proj`."""
        self.num_values = 0

    def config(self, before: Any) -> Any:
        check_family("welore", before, (*LLAMA_LIKE, _FAMILY), "layers with weights in pairs")
        if getattr(before, "rank_by_linear", None):
            raise ConfigError("welore: this model's weights are pairs already; give the model before that")
        self.before = before
        # Which weights these are the singular values tell; foreseen is that all lose the same share.
        self.after = self._config(self._foreseen(before))
        return self.after

    def _foreseen(self, before: Any) -> dict[str, list[int]]:
        layers = range(before.num_hidden_layers)
        head_dim = getattr(before, "head_dim", None) or before.hidden_size // before.num_attention_heads
        sizes = [getattr(before, key, None) for key in _BY_LAYER]
        heads, groups, neurons = (
            of_layers or [getattr(before, key.removesuffix("_by_layer"))] * len(layers)
            for key, of_layers in zip(_BY_LAYER, sizes, strict=True)
        )
        widths = {
            **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), [head_dim * number for number in heads]),
            **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), [head_dim * number for number in groups]),
            **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), neurons),
        }
        share = 1 - self.rank_reduction
        return {
            name: [max(1, round(share * min(width, before.hidden_size))) if width else 0 for width in of_layers]
            for name, of_layers in widths.items()
        }

    def _config(self, ranks: dict[str, list[int]]) -> Any:
        kept = {
            key: value for key in (*_BY_LAYER, *_MATRICES) if (value := getattr(self.before, key, None)) is not None
        }
        return own_config("welore", _FAMILY, self.before, **kept, rank_by_linear=ranks)

    def look(self, model: CalibratedModel) -> Any:
        spectra = {}
        for block in model.blocks():
            for name, parameter in block.module.named_parameters():
                if name.removesuffix(".weight") in _LINEARS:
                    values = torch.linalg.svdvals(parameter.detach().float()).cpu()
                    spectra[f"{block.index}.{name.removesuffix('.weight')}"] = values
        self.num_values = sum(len(values) for values in spectra.values())
        self.ranks = pair_ranks(spectra, self.rank_reduction, self.least_reduction)
        self.left = sum(self.ranks[name] or len(values) for name, values in spectra.items())
        layers = range(self.before.num_hidden_layers)
        table = {name: [self.ranks.get(f"{layer}.{name}", 0) for layer in layers] for name in _LINEARS}
        if not any(self.ranks.values()):
            raise ConfigError(
                f"welore: no weight loses more than least_reduction={self.least_reduction} of its singular values at "
                f"rank_reduction={self.rank_reduction}; raise rank_reduction, or lower least_reduction"
            )
        self.after = self._config(table)
        return self.after

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        tensors = ((name, block.read(name)) for name in sorted(block.names, key=lambda name: name.endswith(".bias")))
        for name, tensor in completed(self.after, self.before.hidden_size, tensors):
            path, _, key = name.rpartition(".")
            rank = self.ranks.get(f"{block.index}.{path}", 0)
            if not rank:
                yield name, tensor
            elif key == "bias":
                yield f"{path}.up.bias", tensor
            else:
                up, down = factors(tensor.float(), rank)
                yield f"{path}.up.weight", up.to(tensor.dtype)
                yield f"{path}.down.weight", down.to(tensor.dtype)

    def describe(self) -> str:
        pairs = sum(rank > 0 for rank in self.ranks.values())
        gone = 1 - self.left / self.num_values
        return f"{pairs} of {len(self.ranks)} weights are pairs, {gone:.1%} of all singular values gone with them"


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return [out, rank] and [rank, in], each with the square roots of the leading singular values of [out, in]."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).contiguous(), (root[:, None] * right[:rank]).contiguous()
