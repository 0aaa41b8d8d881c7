"""Which models may have their rows cut (`layout.cp`). Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from leanmill.core.near import near_divisors
from leanmill.parallel.sequence_plan import DROPOUT


FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3"})
"""Compared with one process, parameter by parameter: tokens meet in attention alone, attention is called through
transformers' registry, and what the model is given besides tokens reaches it."""


def context_problems(config: Any, cp: int, kind: str, tp: int = 1) -> Iterator[str]:
    """Yield why rows of a model cannot be cut into `cp` parts.

    Args:
        config: The family's config: a mapping or a transformers config; what it leaves out is not judged.
        cp: Ranks that share a row.
        kind: `layout.cp_attention`.
        tp: Ranks that share heads before those of a row do.
    """
    get = config.get if isinstance(config, dict) else lambda key: getattr(config, key, None)
    asked, family = f"layout.cp={cp}", get("model_type")
    if family is not None and family not in FAMILIES:
        yield (
            f"{asked} has not been shown to hold for model type {family!r}, but for {', '.join(sorted(FAMILIES))}; "
            f"set layout.cp=1"
        )
    if get("attention_dropout"):
        yield f"{asked} draws no dropout in attention; set model.config.attention_dropout=0, or layout.cp=1"
    for key in DROPOUT:
        if get(key):
            yield (
                f"{asked}: ranks would drop the same places of their parts by model.config.{key}={get(key)}; set it "
                f"to 0, or layout.cp=1"
            )
    heads = get("num_attention_heads")
    if kind == "ulysses" and isinstance(heads, int) and heads > 0 and heads % tp == 0 and heads // tp % cp:
        share = f" / layout.tp={tp}" if tp > 1 else ""
        yield (
            f"{asked} does not divide model.config.num_attention_heads={heads}{share}; set layout.cp="
            f"{near_divisors(cp, heads // tp)}, or layout.cp_attention=all_gather"
        )


def pair_cost(config: Any, num_weights: int) -> float:
    """Return the work of a token and one that it sees, over that of a token in everything but attention.

    Args:
        config: The family's transformers config.
        num_weights: Of the model, each of which multiplies a token once, but for an embedding that is no head too.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    multiplied = num_weights - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    # Scores and what they weigh, against each weight.
    return 2.0 * config.num_attention_heads * head_dim * config.num_hidden_layers / multiplied


def repeats(num_heads: int, num_groups: int, cp: int) -> int:
    """Return how often a head of keys is repeated until ranks get equally many, each those of its queries.

    Args:
        num_heads: Of queries; `cp` divides them.
        num_groups: Heads of keys and values, which divide those.
        cp: Ranks.
    """
    found = (
        r for r in range(1, num_heads // num_groups + 1) if num_heads % (num_groups * r) == num_groups * r % cp == 0
    )
    return next(found)


def sent_numbers(num_heads: int, num_groups: int, head_dim: int, cp: int, kind: str) -> int:
    """Return the numbers that a rank sends in a layer for each token of its own, once forward; as many in backward.

    Ulysses sends queries, keys, values and what was attended to, of which 1 / `cp` stays; keys and values that are
    gathered go to every other rank.

    Args:
        num_heads: Of queries.
        num_groups: Of keys and values.
        head_dim: Of each.
        cp: Ranks that share a row.
        kind: `layout.cp_attention`.
    """
    if kind == "all_gather":
        return (cp - 1) * 2 * num_groups * head_dim
    return (cp - 1) * 2 * (num_heads + num_groups * repeats(num_heads, num_groups, cp)) * head_dim // cp


def seen_bytes(tokens: int, sequence_length: int, cp: int, kind: str) -> int:
    """Return the bytes of the mask that a rank keeps of a micro-batch: a byte for every query it has and key.

    Args:
        tokens: Of the micro-batch, whole rows.
        sequence_length: Of a row.
        cp: Ranks that share a row.
        kind: `layout.cp_attention`.
    """
    return tokens * sequence_length // (cp if kind == "all_gather" else 1)
