"""From a recipe's model section to a model on the meta device."""

from __future__ import annotations

from typing import Any

import torch

from leanmill.core.encoders import first_position, takes_ready_masks
from leanmill.core.errors import ConfigError
from leanmill.core.transposed import as_linears
from leanmill.models.config import ModelConfig
from leanmill.models.document_attention import NAME, has_document_attention, plain_attention, register
from leanmill.models.dropout import set_dropout
from leanmill.models.mapping import check_forward, check_num_parameters, mapped_config, refuse_build
from leanmill.models.pretrained import pretrained_config
from leanmill.models.tasks import auto_class, class_of, options_of


def build_on_meta(
    config: ModelConfig,
    *,
    vocab_size: int | None = None,
    sequence_length: int | None = None,
    device_type: str | None = None,
    packed: bool = True,
    compiled: bool = False,
    pad_token_id: int | None = None,
) -> Any:
    """Build the model without storage: fp32 parameters on the meta device, no key-value cache.

    Args:
        config: The recipe's model section.
        vocab_size: Tokens of the run's tokenizer; fills a missing `vocab_size` and is checked
            against a given one.
        sequence_length: Tokens of a row, checked against the model's longest context.
        device_type: Where the run computes, for `attention: auto`; None is cuda where there is one.
        packed: Whether rows hold several documents, for `attention: auto`.
        compiled: Whether blocks will be compiled, for `attention: auto`.
        pad_token_id: Of the run's tokenizer; that of an encoder must be the same.

    Returns:
        The `PreTrainedModel`, whose layers all have their weight [out, in] (`leanmill.core.transposed`).

    Raises:
        ConfigError: The section cannot be built; the message says what to change.
        RunError: The hub cannot be reached.
    """
    mapping = config.family_config
    hf_config = (
        pretrained_config(config) if config.path is not None else mapped_config(mapping, vocab_size, config.task)
    )
    _check_sizes(hf_config, config, vocab_size, sequence_length)
    hf_config.use_cache = False
    if config.dropout is not None:
        set_dropout(hf_config, config.dropout)
    register()
    try:
        with torch.device("meta"):
            model = auto_class(config.task).from_config(
                hf_config,
                dtype=torch.float32,
                attn_implementation=_attention(config, hf_config, device_type, packed, compiled),
                trust_remote_code=config.trust_remote_code,
                **options_of(hf_config, config.task),
            )
    except Exception as error:
        raise refuse_build(error, hf_config.model_type, mapping, config.task) from error
    as_linears(model)
    check_num_parameters(model)
    if config.task != "causal_lm":
        _check_encoder(model, sequence_length, pad_token_id)
    if mapping is not None:
        check_forward(hf_config, mapping, config.task)
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


def _check_encoder(model: Any, sequence_length: int | None, pad_token_id: int | None) -> None:
    config, first = model.config, first_position(model)
    if not takes_ready_masks(model):
        raise ConfigError(
            f"model type {config.model_type!r} makes attention masks in a way of its own, which knows no packed rows; "
            f"choose a family like bert, roberta, modernbert, distilbert or mpnet"
        )
    if pad_token_id is not None and config.pad_token_id != pad_token_id:
        raise ConfigError(
            f"the model takes token {config.pad_token_id} for padding and the tokenizer {pad_token_id}; set "
            f"model.config.pad_token_id={pad_token_id}, or data.tokenizer to the model's own tokenizer"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if first and sequence_length is not None and longest is not None and sequence_length + first > longest:
        raise ConfigError(
            f"this family counts positions from {first}, so its max_position_embeddings={longest} are a context of "
            f"{longest - first}; set data.sequence_length={longest - first} or less, or raise max_position_embeddings"
        )


def _attention(config: ModelConfig, hf_config: Any, device_type: str | None, packed: bool, compiled: bool) -> str:
    model_class = class_of(type(hf_config), config.task)
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.attention == "per_document" and not has_document_attention(model_class):
        raise ConfigError(
            f"model type {hf_config.model_type!r} has no attention that can go document by document; set "
            f"model.attention=sdpa, or leave it out"
        )
    if config.attention != "auto":
        return config.attention
    if config.task != "causal_lm" or not packed:
        return plain_attention(model_class)
    if device_type == "cuda":
        return "flex_attention" if getattr(model_class, "_supports_flex_attn", False) else plain_attention(model_class)
    return NAME if has_document_attention(model_class) and not compiled else plain_attention(model_class)
