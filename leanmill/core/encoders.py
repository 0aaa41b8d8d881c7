"""Encoders: models whose tokens attend both ways, and what their forward is given."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.batches import Batch


def is_encoder(model: nn.Module) -> bool:
    """Whether a model is of a class of transformers for masked tokens or hidden states, and not a causal LM."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING

    def is_one(mapping: Any) -> bool:
        return isinstance(model, mapping.get(type(getattr(model, "config", None)), ()))

    return not is_one(MODEL_FOR_CAUSAL_LM_MAPPING) and (is_one(MODEL_FOR_MASKED_LM_MAPPING) or is_one(MODEL_MAPPING))


def encoder_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return the arguments of an encoder for packed rows: no token attends across documents, none to padding."""
    positions = batch["position_ids"]
    document = (positions == 0).cumsum(-1)
    if "token_mask" in batch:
        document = document.masked_fill(~batch["token_mask"], 0)
    may_attend = document[:, :, None] == document[:, None, :]
    return {
        "input_ids": batch["input_ids"],
        "position_ids": positions + first_position(model),
        "attention_mask": _as_the_family_takes_it(model, may_attend),
    }


def embedding_inputs(model: nn.Module, batch: Batch) -> tuple[dict[str, Any], Tensor]:
    """Return the arguments of an encoder for rows of several texts, and which of its positions are tokens.

    What is padding in every text of the micro-batch is left out, but for a multiple of 8.

    Args:
        model: An encoder.
        batch: Rows of texts side by side, with `text_lengths` [B, texts].

    Returns:
        The arguments, of [B x texts, length], and bool [B x texts, length].
    """
    lengths = batch["text_lengths"].flatten()
    ids = batch["input_ids"].view(len(lengths), -1)
    longest = min(ids.shape[1], -(-int(lengths.max()) // 8) * 8)
    places = torch.arange(longest, device=ids.device)
    is_token = places < lengths[:, None]
    # A text that is not there is one token of padding: a softmax over nothing has no value.
    seen = places < lengths.clamp(min=1)[:, None]
    inputs = {
        "input_ids": ids[:, :longest],
        "position_ids": (places + first_position(model)).expand(len(ids), -1),
        "attention_mask": seen.long(),
    }
    return inputs, is_token


def first_position(model: nn.Module) -> int:
    """Return the position of a text's first token: RoBERTa and its kin count from behind the padding's."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1  # type: ignore[arg-type]
    return 0


def takes_ready_masks(model: nn.Module) -> bool:
    """Whether the family leaves masks to transformers' own function, which passes one on that is there already."""
    return hasattr(sys.modules[type(model).__module__], "create_bidirectional_mask")


def _as_the_family_takes_it(model: Any, may_attend: Tensor) -> Any:
    """Return a mask [B, S, S], bool, as transformers would have made it for this model."""
    config = model.config
    found = _for_attention(config._attn_implementation, may_attend)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return found
    places = torch.arange(may_attend.shape[-1], device=may_attend.device)
    is_near = (places[:, None] - places).abs() <= config.sliding_window
    near = _for_attention(config._attn_implementation, may_attend & is_near)
    return {"full_attention": found, "sliding_attention": near}


def _for_attention(implementation: str, may_attend: Tensor) -> Tensor:
    mask = may_attend[:, None]
    if implementation == "sdpa":
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
