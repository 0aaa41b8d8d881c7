"""Models whose blocks are Llama's: which they are, and the configuration of a family of our own that is like one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError


LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
"""transformers' families whose blocks are of that kind."""
OWN_FAMILIES = ("pruned_llama", "folded_llama", "linear_llama", "latent_llama")
"""Those of `leanmill.models` that are."""
_COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
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
    "residual_rotations",
    "qk_norm",
)


def check_family(technique: str, config: Any, families: Sequence[str], becomes: str) -> None:
    """Refuse a model of another family, and one whose attention has windows.

    Args:
        technique: Who asks.
        config: transformers configuration.
        families: Which there may be.
        becomes: What the technique makes of them, such as `layers of different sizes`.

    Raises:
        ConfigError: See above.
    """
    if config.model_type not in families:
        raise ConfigError(
            f"{technique} makes {becomes} of {', '.join(families)}, and {config.model_type!r} is none of them; give a "
            f"model of one of these"
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < config.max_position_embeddings:
        raise ConfigError(
            f"{technique}: this {config.model_type} attends to windows of {window} tokens, which {becomes} cannot "
            f"have; give a model without sliding_window"
        )


def own_config(technique: str, family: str, before: Any, **settings: Any) -> Any:
    """Return the transformers configuration of a model of a family of Leanmill's own, as `before` but for `settings`.

    Raises:
        ConfigError: The family refuses them.
    """
    from transformers import AutoConfig

    copied = {name: getattr(before, name) for name in _COPIED if hasattr(before, name)}
    if before.model_type == "qwen3":
        copied["qk_norm"] = True
    if before.model_type == "qwen2":
        copied["attention_bias"] = True
    try:
        return AutoConfig.for_model(family, **copied | settings)
    except Exception as error:
        text = str(error.__cause__ or error).splitlines()[-1]
        raise ConfigError(f"{technique}: no {family} is like this: {text}; ask for something else") from error


def completed(after: Any, hidden: int, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a block, and biases of zeros that its new family has and its old one had not.

    Args:
        after: Configuration of the new model.
        hidden: Channels of its residual stream.
        tensors: Of one block, by name relative to it.
    """
    dtypes = {}
    for name, tensor in tensors:
        dtypes[name] = tensor.dtype
        yield name, tensor
    weight, bias = "self_attn.o_proj.weight", "self_attn.o_proj.bias"
    if after.model_type in OWN_FAMILIES and after.attention_bias and weight in dtypes and bias not in dtypes:
        yield bias, torch.zeros(hidden, dtype=dtypes[weight])
