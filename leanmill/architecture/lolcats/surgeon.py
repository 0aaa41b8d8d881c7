"""The model with linear attention, written from what its attention puts out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from leanmill.architecture.lolcats.transfer import Transferred, transfer
from leanmill.core.blocks import decoder_blocks
from leanmill.core.llama_like import LLAMA_LIKE, check_family, completed, own_config
from leanmill.core.surgery import CalibratedModel, LookingSurgeon, StoredBlock


_FAMILY = "linear_llama"
"""Of Leanmill's own; see `leanmill.models.linear_llama`."""


class LolcatsSurgeon(LookingSurgeon):
    """Turns softmax attention into a window of it and linear attention behind; see `Lolcats`.

    Args:
        window: Tokens of the window.
        feature_dim: Columns of a map of features.
        epochs: Passes over the rows for each layer.
        lr: Of the maps.
        seed: For how the maps begin.
    """

    def __init__(self, *, window: int, feature_dim: int, epochs: int, lr: float, seed: int) -> None:
        self.window, self.feature_dim, self.epochs, self.lr, self.seed = window, feature_dim, epochs, lr, seed
        self._after: Any = None
        self.layers: list[Transferred] = []
        """Of each block."""

    def config(self, before: Any) -> Any:
        check_family("lolcats", before, LLAMA_LIKE, "linear attention")
        self._after = own_config(
            "lolcats",
            _FAMILY,
            before,
            head_dim=getattr(before, "head_dim", None) or before.hidden_size // before.num_attention_heads,
            sliding_window=self.window,
            feature_dim=self.feature_dim,
            layer_types=None,
        )
        return self._after

    def look(self, model: CalibratedModel) -> Any:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            like_it = AutoModelForCausalLM.from_config(self._after)
        students = [block.get_submodule("self_attn") for block in decoder_blocks(like_it)]
        generator = torch.Generator().manual_seed(self.seed)
        self.layers = []
        for block in model.blocks():
            device = next(block.module.parameters()).device
            self.layers.append(
                transfer(
                    students[block.index].to_empty(device=device),
                    block,
                    model.total,
                    epochs=self.epochs,
                    lr=self.lr,
                    num_batches=len(model.rows),
                    generator=generator,
                )
            )
            students[block.index].to("meta")
            for _ in block.run():  # with softmax attention: each layer learns on what the model there was gives it
                pass
        return self._after

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        kept = ((name, block.read(name)) for name in sorted(block.names))
        yield from completed(self._after, self._after.hidden_size, kept)
        dtype = block.read("self_attn.q_proj.weight").dtype
        for name, learned in self.layers[block.index].learned.items():
            yield f"self_attn.{name}", learned.to(dtype)

    def describe(self) -> str:
        errors = [layer.error for layer in self.layers]
        return (
            f"softmax attention in windows of {self.window} and linear attention behind, which misses "
            f"{sum(errors) / len(errors):.2%} of the outputs' energy, {max(errors):.2%} in the worst layer"
        )
