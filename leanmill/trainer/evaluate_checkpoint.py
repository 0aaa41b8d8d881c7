"""Scoring a checkpoint or a model folder on held-out text in one process, without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.probes import Probe
from leanmill.data.build import build_eval_data, build_tokenizer
from leanmill.data.config import ENCODER_TASKS
from leanmill.data.evaluation import EvalDomain
from leanmill.data.tokenizer import load_tokenizer
from leanmill.models.offloading import Held
from leanmill.parallel.build import build_engine
from leanmill.parallel.config import SingleEngine
from leanmill.parallel.engine import Engine
from leanmill.parallel.launch import Ranks, finish, init_processes
from leanmill.parallel.precision import resolve_precision
from leanmill.recipe.io import load_recipe, override_recipe, validate_recipe
from leanmill.recipe.root import Recipe
from leanmill.recipe.yaml_source import Lines
from leanmill.report.observer import DomainScore, Sample
from leanmill.trainer.evaluation import Evaluation, evaluate
from leanmill.trainer.inference import load_for_inference, to_be_scored
from leanmill.trainer.prepare import train_module
from leanmill.trainer.rebuild import rebuild
from leanmill.trainer.samples import Sampler
from leanmill.trainer.train_module import TrainModule


_CHANGEABLE = ("data.", "eval.", "batch.", "device", "train.precision")
"""What an evaluation may change of the saved recipe; the rest belongs to the weights."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Scores of one checkpoint, or of a model folder."""

    checkpoint: Path
    step: int | None
    """None of a folder."""
    scores: dict[str, DomainScore]
    """By domain, and `all`."""
    metrics: Mapping[str, float]
    """What probes report, as `probe/metric`."""
    tables: Mapping[str, Any]
    """What probes counted."""
    notes: tuple[str, ...]
    """What probes could not say, and why; and where less text was held out than asked for."""
    samples: tuple[Sample, ...] = ()
    """What the model adds to the recipe's `eval.prompts`."""


def evaluate_checkpoint(
    checkpoint_dir: Path,
    overrides: Sequence[str] = (),
    more_probes: Callable[[nn.Module], Sequence[Probe]] = lambda model: (),
) -> Evaluated:
    """Rebuild the trained model, techniques in place, and score it as training does.

    Args:
        checkpoint_dir: A complete checkpoint.
        overrides: `a.b=c` on the saved recipe, within `data`, `eval`, `batch`, `device` and `train.precision`.
        more_probes: Returns what looks on beside the techniques' own probes, given the model.

    Raises:
        ConfigError: An override of something that belongs to the weights, or a bad value.
        RunError: The checkpoint is damaged.
    """
    rebuilt = rebuild(checkpoint_dir)
    raw = json.loads(rebuilt.recipe.model_dump_json())
    recipe = _overridden(raw, overrides, checkpoint_dir, source=str(checkpoint_dir / "recipe.json"))
    probes = [*rebuilt.probes, *more_probes(rebuilt.model)]
    return _evaluated(checkpoint_dir, rebuilt.step, recipe, rebuilt.model, rebuilt.tokenizer_dir, probes)


def evaluate_folder(
    folder: Path, overrides: Sequence[str] = (), recipe_file: str | None = None, *, weights_gib: float | None = None
) -> Evaluated:
    """Score a Hugging Face folder as it is meant to be run (`load_for_inference`).

    Args:
        folder: Of a causal LM, with its tokenizer.
        overrides: As for `evaluate_checkpoint`; of a recipe with the defaults, so that text is that of `local_corpus`
            where nothing is said.
        recipe_file: Recipe whose `data`, `eval`, `batch`, `device` and precision take the place of the defaults.
        weights_gib: The most of its weights that is held, see `leanmill.models.offloading`; None holds all.

    Raises:
        ConfigError: It is no such folder, or a bad override.
    """
    # Nothing is trained; a recipe must say how long.
    raw: dict[str, Any] = {"model": {"path": str(folder)}, "train": {"steps": 1}}
    if recipe_file is not None:
        given = load_recipe(recipe_file).model_dump(mode="json")
        raw |= {key: given[key] for key in ("seed", "device", "data", "eval", "batch")}
        raw["train"]["precision"] = given["train"]["precision"]
    recipe = _overridden(raw, overrides, folder, source="the recipe of an evaluation")
    has_gpu = recipe.device != "cpu" and torch.cuda.is_available()
    held = None if weights_gib is None else Held(weights_gib, torch.device("cuda" if has_gpu else "cpu"))
    loaded = load_for_inference(folder, dtype=torch.float32, held=held)
    return _evaluated(folder, None, recipe, loaded.model, folder, loaded.probes)


def _evaluated(
    folder: Path, step: int | None, recipe: Recipe, model: Any, tokenizer_dir: Path | None, probes: Sequence[Probe]
) -> Evaluated:
    ranks = init_processes(recipe.device, recipe.cluster)
    try:
        found, shortfalls, samples = _score(recipe, model, _tokenizer(recipe, tokenizer_dir), ranks, probes)
    finally:
        finish()
    return Evaluated(
        checkpoint=folder,
        step=step,
        scores=dict(found.scores),
        metrics=found.metrics,
        tables=found.tables,
        notes=(*found.notes, *shortfalls),
        samples=samples,
    )


def _score(
    recipe: Recipe, model: Any, tokenizer: Any, ranks: Ranks, probes: Sequence[Probe]
) -> tuple[Evaluation, list[str], tuple[Sample, ...]]:
    if ranks.world_size > 1:
        raise ConfigError(f"an evaluation is one process, {ranks.world_size} were started; type `leanmill eval ...`")
    sampler = Sampler(recipe, tokenizer)
    domains = build_eval_data(recipe.data, tokenizer, tokens_per_domain=recipe.eval.tokens_per_domain)
    precision = resolve_precision(recipe.train.precision, ranks.device.type)
    engine, _ = build_engine(SingleEngine(), ranks=ranks, precision=precision, model_bytes=0)
    rows = recipe.batch.tokens_per_micro_batch // recipe.data.sequence_length
    engine.module = to_be_scored(train_module(recipe, model), engine.device)
    found = evaluate(engine, domains, rows, probes)
    shortfalls = [line for domain in domains for line in domain.shortfall()]
    return found, shortfalls, sampler(engine)


def score_domains(
    engine: Engine,
    model: Any,
    domains: Sequence[EvalDomain],
    rows_per_batch: int,
    probes: Sequence[Probe] = (),
    chunk_tokens: int | Literal["auto"] = "auto",
) -> Evaluation:
    """Score a whole model on held-out rows, as training does.

    Args:
        engine: Of one process, not prepared: there is no optimizer to build, only a module to run.
        model: A causal LM.
        domains: Held-out rows.
        rows_per_batch: Rows of one forward.
        probes: What looks on.
        chunk_tokens: See `TrainModule`.
    """
    engine.module = to_be_scored(TrainModule(model, (), chunk_tokens=chunk_tokens), engine.device)
    return evaluate(engine, domains, rows_per_batch, probes)


def _overridden(raw: dict[str, Any], overrides: Sequence[str], folder: Path, *, source: str) -> Recipe:
    for override in overrides:
        key = override.partition("=")[0]
        if not key.startswith(_CHANGEABLE):
            raise ConfigError(
                f"override {override!r}: {key} belongs to the trained weights of {folder}; an evaluation may "
                f"change data.*, eval.*, batch.*, device and train.precision"
            )
    lines: Lines = {}
    override_recipe(raw, overrides, lines)
    return validate_recipe(raw, source=source, lines=lines)


def _tokenizer(recipe: Recipe, saved: Path | None) -> Any:
    """Return the run's own tokenizer: the corpus of this machine may have changed since."""
    if saved is None:
        return build_tokenizer(recipe.data, seed=recipe.seed)
    return load_tokenizer(
        str(saved),
        trust_remote_code=recipe.data.tokenizer.trust_remote_code,
        for_encoder=recipe.data.task in ENCODER_TASKS,
    )
