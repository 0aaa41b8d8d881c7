"""`leanmill eval`: score a checkpoint, or a model folder, on held-out text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from leanmill.trainer.evaluate_checkpoint import Evaluated

_CAUSES = ("token", "previous_token", "position")
"""What a study holds experts against."""


def run(args: argparse.Namespace) -> int:
    """Print loss, perplexity and bits per byte of every domain, and what probes found."""
    from dataclasses import asdict

    from leanmill.cli.checkpoints import is_model_folder, resolve_checkpoint
    from leanmill.core.errors import ConfigError

    if is_model_folder(Path(args.checkpoint)):
        from leanmill.trainer.evaluate_checkpoint import evaluate_folder

        if args.studies_routing:
            raise ConfigError(
                f"--routing studies the checkpoints of a run, and {args.checkpoint} is a model folder; leave it out"
            )
        checkpoint = Path(args.checkpoint)
        result = evaluate_folder(checkpoint, args.overrides, args.recipe, weights_gib=args.weights_gib)
        study, lines = None, list[str]()
    else:
        if args.recipe is not None:
            raise ConfigError(
                f"--recipe is for Hugging Face model folders, and {args.checkpoint} is none; a checkpoint has its "
                f"recipe with it: type its keys to change, e.g. eval.tokens_per_domain=100000"
            )
        if args.weights_gib is not None:
            raise ConfigError(
                f"--weights-gib is for Hugging Face model folders, and {args.checkpoint} is of a run, whose model is "
                f"built whole; leave it out, or export it and give that folder"
            )
        checkpoint = resolve_checkpoint(args.checkpoint)
        result, study, lines = _evaluate(checkpoint, args.overrides, routing=args.studies_routing)
    if args.json:
        domains = {name: asdict(score) for name, score in result.scores.items()}
        found: dict[str, Any] = {"checkpoint": str(checkpoint), "step": result.step, "domains": domains}
        found |= {"metrics": result.metrics, "tables": result.tables, "routing": study}
        print(json.dumps({**found, "samples": [asdict(sample) for sample in result.samples]}, indent=2))
        return 0
    print(checkpoint if result.step is None else f"{checkpoint}, step {result.step:,}")
    print(f"{'domain':<12} {'loss':>8} {'perplexity':>11} {'bits/byte':>10} {'order-0':>8} {'tokens':>9}")
    for name, score in result.scores.items():
        print(
            f"{name:<12} {score.loss:>8.4f} {_number(score.perplexity, 11, 2)} {_number(score.bits_per_byte, 10, 4)} "
            f"{_number(score.order0_bits_per_byte, 8, 4)} {score.num_tokens:>9,}"
        )
    samples = [f"> {sample.prompt}{sample.text}" for sample in result.samples]
    for line in (*_metrics(result.metrics), *result.notes, *lines, *samples):
        print(line)
    return 0


def _evaluate(
    checkpoint: Path, overrides: Sequence[str], *, routing: bool
) -> tuple[Evaluated, Mapping[str, Any] | None, list[str]]:
    """Return the evaluation, the study if one was asked for, and what to say of it."""
    if not routing:
        from leanmill.trainer.evaluate_checkpoint import evaluate_checkpoint

        return evaluate_checkpoint(checkpoint, overrides), None, []
    from leanmill.study.routing import study_routing

    result, path, study = study_routing(checkpoint, overrides)
    return result, study, [*_summary(study), f"study: {path}; `leanmill report {path.parent}` shows it"]


def _metrics(metrics: Mapping[str, float]) -> list[str]:
    """Means over layers; those of one layer have a second slash."""
    return [f"{name} {value:.4f}" for name, value in metrics.items() if name.count("/") == 1]


def _summary(study: Mapping[str, Any]) -> list[str]:
    found = study["dependence"]
    lines = []
    if known := [i for i, share in enumerate(found["token"]) if share is not None]:
        means = {key: sum(found[key][i] for i in known) / len(known) for key in _CAUSES}
        parts = [f"{key.replace('_', ' ')} {mean:.1%}" for key, mean in means.items()]
        lines.append(f"experts predicted by {', '.join(parts)} (mean over layers)")
    else:
        lines.append("too few tokens repeat to say what experts depend on; raise eval.tokens_per_domain")
    for one in study["learning"]:
        share, chance = (sum(one[key]) / len(one[key]) for key in ("share", "by_chance"))
        lines.append(f"step {one['step']:,} chose {share:.1%} of these experts (by chance {chance:.1%})")
    return lines


def _number(value: float | None, width: int, decimals: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{decimals}f}"
