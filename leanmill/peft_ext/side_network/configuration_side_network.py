"""Configuration of the family `side_network`. Imports nothing of Leanmill, so that it can travel with its weights."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


class SideNetworkConfig(PreTrainedConfig):
    """A causal LM of any family of transformers, and a network beside its blocks.

    Args:
        base: Configuration of the causal LM, as its `to_dict` has it.
        method: `unipt` or `sherl`.
        size: Features of the network.
        read: Indices of the blocks whose inputs it reads.
        where: Index of the block that it stands behind (`unipt`) or before (`sherl`).
        keeps_base: Whether the model's own hidden states are added to what the network makes.
        blocks: Name of the list of blocks in the causal LM.
        **kwargs: Of `PreTrainedConfig`.
    """

    model_type = "side_network"

    def __init__(
        self,
        base: dict[str, Any] | None = None,
        method: str = "unipt",
        size: int = 1,
        read: list[int] | None = None,
        where: int = 0,
        keeps_base: bool = True,
        blocks: str = "model.layers",
        **kwargs: Any,
    ) -> None:
        self.base = dict(base or {"model_type": "llama"})
        self.method, self.size, self.read, self.where = method, size, list(read or [0]), where
        self.keeps_base, self.blocks = keeps_base, blocks
        inner = self.base_config()
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
            kwargs.setdefault(key, getattr(inner, key, None))
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
            kwargs.setdefault(key, getattr(inner, key, None))
        super().__init__(**kwargs)

    def base_config(self) -> Any:
        """Return the configuration of the causal LM, as an object."""
        given = {key: value for key, value in self.base.items() if key != "model_type"}
        return AutoConfig.for_model(self.base["model_type"], **given)
