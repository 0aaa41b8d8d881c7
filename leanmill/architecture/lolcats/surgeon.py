"""The model with linear attention, written from what its attention puts out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from leanmill.architecture.lolcats.transfer import Transferred, transfer
from leanmill.core.blocks import decoder_blocks
from leanmill.core.errors import ConfigError
from leanmill.core.surgery import CalibratedModel, LookingSurgeon, StoredBlock


_FAMILY = "linear_llama"
"""Of Leanmill's own; see `leanmill.models.linear_llama`."""
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "dtype",
)


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
        self._has_output_bias = False
        self.layers: list[Transferred] = []
        """Of each block."""

    def config(self, before: Any) -> Any:
        _check_family(before)
        self._after = self._config_after(before)
        self._has_output_bias = bool(self._after.attention_bias)
        return self._after

    def _config_after(self, before: Any) -> Any:
        from transformers import AutoConfig

        copied = {name: getattr(before, name) for name in _COPIED if hasattr(before, name)}
        copied["head_dim"] = getattr(before, "head_dim", None) or before.hidden_size // before.num_attention_heads
        copied["qk_norm"] = before.model_type == "qwen3"
        if before.model_type == "qwen2":
            copied["attention_bias"] = True
        try:
            return AutoConfig.for_model(
                _FAMILY, **copied, sliding_window=self.window, feature_dim=self.feature_dim, layer_types=None
            )
        except Exception as error:
            text = str(error.__cause__ or error).splitlines()[-1]
            raise ConfigError(f"lolcats: no {_FAMILY} is like this model: {text}; give another model") from error

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
        yield from ((name, block.read(name)) for name in sorted(block.names))
        dtype, output_bias = block.read("self_attn.q_proj.weight").dtype, "self_attn.o_proj.bias"
        if self._has_output_bias and output_bias not in block.names:
            yield output_bias, torch.zeros(self._after.hidden_size, dtype=dtype)
        for name, learned in self.layers[block.index].learned.items():
            yield f"self_attn.{name}", learned.to(dtype)

    def describe(self) -> str:
        errors = [layer.error for layer in self.layers]
        return (
            f"softmax attention in windows of {self.window} and linear attention behind, which misses "
            f"{sum(errors) / len(errors):.2%} of the outputs' energy, {max(errors):.2%} in the worst layer"
        )


def _check_family(before: Any) -> None:
    if before.model_type not in _FAMILIES:
        raise ConfigError(
            f"lolcats turns the attention of {', '.join(_FAMILIES)} into linear attention, and {before.model_type!r} "
            f"is none of them; give a model of one of these"
        )
    window = getattr(before, "sliding_window", None) if getattr(before, "use_sliding_window", True) else None
    if window is not None and window < before.max_position_embeddings:
        raise ConfigError(
            f"lolcats: this {before.model_type} attends to windows of {window} tokens already; give a model without "
            f"sliding_window"
        )
