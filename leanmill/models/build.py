"""From a recipe's model section to a causal LM on the meta device."""

from __future__ import annotations

from typing import Any

import torch

from leanmill.core.errors import ConfigError
from leanmill.models.config import ModelConfig
from leanmill.models.mapping import check_forward, check_num_parameters, mapped_config, refuse_build
from leanmill.models.pretrained import pretrained_config


def build_on_meta(
    config: ModelConfig,
    *,
    vocab_size: int | None = None,
    sequence_length: int | None = None,
    device_type: str | None = None,
    packed: bool = True,
) -> Any:
    """Build the causal LM without storage: fp32 parameters on the meta device, no key-value cache.

    Args:
        config: The recipe's model section.
        vocab_size: Tokens of the run's tokenizer; fills a missing `vocab_size` and is checked
            against a given one.
        sequence_length: Tokens of a row, checked against the model's longest context.
        device_type: Where the run computes, for `attention: auto`; None is cuda where there is one.
        packed: Whether rows hold several documents, for `attention: auto`.

    Returns:
        The `PreTrainedModel`.

    Raises:
        ConfigError: The section cannot be built; the message says what to change.
        RunError: The hub cannot be reached.
    """
    from transformers import AutoModelForCausalLM

    mapping = config.family_config
    hf_config = pretrained_config(config) if config.path is not None else mapped_config(mapping, vocab_size)
    _check_sizes(hf_config, config, vocab_size, sequence_length)
    hf_config.use_cache = False
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                hf_config,
                dtype=torch.float32,
                attn_implementation=_attention(config, hf_config, device_type, packed),
                trust_remote_code=config.trust_remote_code,
            )
    except Exception as error:
        raise refuse_build(error, hf_config.model_type, mapping) from error
    check_num_parameters(model)
    if mapping is not None:
        check_forward(hf_config, mapping)
    return model.train()


def _check_sizes(hf_config: Any, config: ModelConfig, vocab_size: int | None, sequence_length: int | None) -> None:
    if vocab_size is not None and hf_config.vocab_size < vocab_size:
        raise ConfigError(
            f"the model has {hf_config.vocab_size} embeddings and the tokenizer {vocab_size} tokens; set "
            f"model.config.vocab_size to at least {vocab_size}, or data.tokenizer to the model's own tokenizer"
        )
    longest = config.max_context or getattr(hf_config, "max_position_embeddings", None)
    if sequence_length is not None and longest is not None and sequence_length > longest:
        field = "model.max_context" if config.max_context else "max_position_embeddings"
        raise ConfigError(
            f"data.sequence_length={sequence_length} is longer than the model's context, {field}={longest}; "
            f"set data.sequence_length={longest} or less, or raise {field}"
        )


def _attention(config: ModelConfig, hf_config: Any, device_type: str | None, packed: bool) -> str:
    if config.attention != "auto":
        return config.attention
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    return "flex_attention" if device_type == "cuda" and packed and _supports_flex(hf_config) else "sdpa"


def _supports_flex(hf_config: Any) -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(hf_config), None)
    return bool(getattr(model_class, "_supports_flex_attn", False))
