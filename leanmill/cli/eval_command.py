"""`leanmill eval`: score a checkpoint on held-out text."""

from __future__ import annotations

import argparse
import json


def run(args: argparse.Namespace) -> int:
    """Print loss, perplexity and bits per byte of every domain."""
    from dataclasses import asdict

    from leanmill.cli.checkpoints import resolve_checkpoint

    checkpoint = resolve_checkpoint(args.checkpoint)
    from leanmill.trainer.evaluate_checkpoint import evaluate_checkpoint

    result = evaluate_checkpoint(checkpoint, args.overrides)
    if args.json:
        scores = {name: asdict(score) for name, score in result.scores.items()}
        print(json.dumps({"checkpoint": str(checkpoint), "step": result.step, "domains": scores}, indent=2))
        return 0
    print(f"{checkpoint}, step {result.step:,}")
    print(f"{'domain':<12} {'loss':>8} {'perplexity':>11} {'bits/byte':>10} {'order-0':>8} {'tokens':>9}")
    for name, score in result.scores.items():
        print(
            f"{name:<12} {score.loss:>8.4f} {score.perplexity:>11.2f} {score.bits_per_byte:>10.4f} "
            f"{score.order0_bits_per_byte:>8.4f} {score.num_tokens:>9,}"
        )
    return 0
