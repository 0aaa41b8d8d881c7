"""`leanmill generate`: continue a prompt with an exported folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from leanmill.export.generation import Continuation


def run(args: argparse.Namespace) -> int:
    """Print the prompt with what the model adds, and tokens a second; beside bf16 if asked."""
    from leanmill.core.errors import ConfigError
    from leanmill.export.generation import (
        Continuation,
        generate,
        open_model,
        open_tokenizer,
        plain_bf16,
        prompt_ids,
        stop_tokens,
    )

    folder = Path(args.model)
    if args.beside_bf16 and args.weights_gib is not None:
        raise ConfigError("--beside-bf16 holds both models whole; leave it or --weights-gib out")
    model, tokenizer = open_model(folder, weights_gib=args.weights_gib), open_tokenizer(folder)
    longest = getattr(model.config, "max_position_embeddings", None)
    ids = prompt_ids(tokenizer, args.prompt, room=None if longest is None else longest - args.max_new_tokens)
    models = {"as exported": model}
    if args.beside_bf16:
        models["in bf16"] = plain_bf16(folder)
    options: dict[str, Any] = {"temperature": args.temperature, "seed": args.seed}
    found = {name: Continuation(one, ids, **options) for name, one in models.items()}
    stops = frozenset() if args.beside_bf16 else stop_tokens(model)
    generate(list(found.values()), max_new_tokens=args.max_new_tokens, stops=stops)
    texts = {name: tokenizer.decode(one.generated.token_ids) for name, one in found.items()}
    if args.json:
        print(json.dumps({name: {"text": texts[name], **_figures(one)} for name, one in found.items()}, indent=2))
        return 0
    print(args.prompt + texts["as exported"])
    for name, one in found.items():
        print(f"{name}: {_told(one)}")
    return 0


def _figures(one: Continuation) -> dict[str, Any]:
    generated = one.generated
    return {
        "num_tokens": len(generated.token_ids),
        "prompt_seconds": generated.prompt_seconds,
        "tokens_per_second": generated.tokens_per_second,
    }


def _told(one: Continuation) -> str:
    speed, generated = one.generated.tokens_per_second, one.generated
    rate = "" if speed is None else f", then {speed:.1f} tokens/s"
    return f"{len(generated.token_ids)} tokens, the prompt and the first in {generated.prompt_seconds:.2f} s{rate}"
