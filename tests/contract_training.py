"""How the contract trains the cases of `tests.contract_cases`: fixed rows, a recipe, an engine, full parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanmill.core.sites import iter_sites
from leanmill.kernels.nm_mask.op import nm_mask
from leanmill.models.build import build_on_meta
from leanmill.parallel.build import build_engine
from leanmill.parallel.engine import Engine
from leanmill.parallel.launch import Ranks
from leanmill.recipe.root import Recipe
from leanmill.trainer.loop import Loop
from leanmill.trainer.prepare import prepare
from tests.contract_cases import (
    CHUNK_TOKENS,
    EXTRA_TECHNIQUES,
    FROZEN_DTYPES,
    OF_PRUNED,
    TECHNIQUES,
)
from tests.contract_combinations import BF16_COMBINATIONS, COMBINATIONS
from tests.contract_models import ENCODERS, MODEL, MODELS, NUM_ROWS, NUM_STEPS, SEQUENCE_LENGTH, VOCAB_SIZE


class FixedRows:
    """Training rows drawn from a seed; unequal numbers of targets a row, so ranks differ too."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        shape = (NUM_STEPS * NUM_ROWS, SEQUENCE_LENGTH)
        self.ids = torch.randint(VOCAB_SIZE, shape, generator=generator)
        self.labels = torch.randint(VOCAB_SIZE, shape, generator=generator)
        for row in range(shape[0]):
            self.labels[row, : 1 + (5 * row) % 13] = -100
        self.position_tokens = 0

    def next_rows(self, num_rows: int, *, rank: int, world_size: int) -> dict[str, Tensor]:
        first = self.position_tokens // SEQUENCE_LENGTH
        self.position_tokens += num_rows * SEQUENCE_LENGTH
        # Both micro-batches hold the same rows, over all ranks, whatever the number of ranks.
        part = torch.arange(first, first + num_rows).view(2, world_size, -1)[:, rank].flatten()
        positions = torch.arange(SEQUENCE_LENGTH).expand(len(part), -1)
        return {
            "input_ids": self.ids[part],
            "labels": self.labels[part],
            "position_ids": positions.contiguous(),
            "row_ids": part,
        }


def _with_teacher(value: Any, teacher: str) -> Any:
    if isinstance(value, list):
        return [_with_teacher(one, teacher) for one in value]
    return value.replace("TEACHER", teacher) if isinstance(value, str) else value


def recipe_of(
    names: tuple[str, ...], engine: dict[str, Any], teacher: str, world_size: int, precision: str = "fp32"
) -> Recipe:
    """Two micro-batches a rank, whatever the number of ranks."""
    known = TECHNIQUES | EXTRA_TECHNIQUES
    techniques = [
        {key: _with_teacher(value, teacher) for key, value in known[name].items()} for name in names if name in known
    ]
    model = next((MODELS[name] for name in names if name in MODELS), MODEL)
    source: dict[str, Any] = {"path": f"{teacher}/pruned"} if OF_PRUNED & set(names) else {"config": model}
    data = {"sequence_length": SEQUENCE_LENGTH}
    for encoder in (ENCODERS[name] for name in names if name in ENCODERS):
        source, data = {"task": "masked_lm", "config": encoder}, {**data, "task": "masked"}
    kept = next((name for name in names if name in FROZEN_DTYPES), "auto")
    tokens = NUM_ROWS * SEQUENCE_LENGTH
    return Recipe.model_validate(
        {
            "device": "cpu",
            "model": source | {"frozen_dtype": kept},
            "data": data,
            "techniques": techniques,
            "engine": engine,
            # A large eps keeps Adam from turning rounding noise in near-zero gradients into full steps.
            "optimizer": {"type": "adamw", "lr": 1e-2, "eps": 1e-3},
            "schedule": {"type": "constant", "warmup_steps": 0},
            "batch": {"tokens_per_step": tokens, "tokens_per_micro_batch": tokens // (2 * world_size)},
            "train": {
                "cross_entropy_weight": 0.0 if "on_policy" in names else 1.0,
                "steps": NUM_STEPS,
                "precision": precision,
                "max_grad_norm": 0.5,
                "logits_chunk_tokens": CHUNK_TOKENS if "distill_reverse" in names else "auto",
            },
        }
    )


def train(
    recipe: Recipe, ranks: Ranks, *, num_steps: int = NUM_STEPS, data: FixedRows | None = None
) -> tuple[Engine, Loop]:
    """Train the recipe on fixed rows through the real preparation and loop."""
    model = build_on_meta(recipe.model, vocab_size=None)
    engine, _ = build_engine(
        recipe.engine, ranks=ranks, precision=recipe.train.precision, model_bytes=0, layout=recipe.layout
    )
    prepared = prepare(recipe, model, engine, num_micro_batches=2)
    loop = Loop(
        recipe=recipe,
        engine=engine,
        data=FixedRows() if data is None else data,
        step_rules=prepared.techniques.step_rules,
        observers=(),
        num_steps=recipe.train.steps or NUM_STEPS,
        num_micro_batches=2,
        save=lambda step: None,
        evaluate=lambda step: None,
    )
    loop.start()
    for _ in range(num_steps):
        loop.train_step()
        loop.step += 1
    return engine, loop


def full_parameters(engine: Engine) -> dict[str, Tensor]:
    """Every parameter of the model, full, by name. A collective."""
    names = [name for name, _ in engine.module.model.named_parameters()]
    return {name: engine.full_parameter(name) for name in names}


def train_combinations(
    engine: dict[str, Any], teacher: str, ranks: Ranks, combinations: dict[str, tuple[str, ...]] = COMBINATIONS
) -> dict[str, dict[str, Tensor]]:
    """Train every combination on this engine."""
    results: dict[str, dict[str, Tensor]] = {}
    for key, names in combinations.items():
        trained, _ = train(recipe_of(names, engine, teacher, ranks.world_size), ranks)
        results[key] = full_parameters(trained)
        trained.close()
    return results


def train_in_bf16(
    engine: dict[str, Any], teacher: str, ranks: Ranks, combinations: dict[str, tuple[str, ...]] = BF16_COMBINATIONS
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Train combinations in bf16; return the parameters and the staged weights that the next forward used."""
    results = {}
    for key, names in combinations.items():
        trained, _ = train(recipe_of(names, engine, teacher, ranks.world_size, "bf16"), ranks)
        staged = staged_in_forward(trained)
        results[key] = {"parameters": full_parameters(trained), "staged": staged}
        trained.close()
    return results


def staged_in_forward(engine: Engine) -> dict[str, Tensor]:
    """The weight that every site multiplies with in a forward of this engine, by site. A collective."""
    found: dict[str, Tensor] = {}
    sites = dict(iter_sites(engine.module.model))

    def watched(name: str, site: Any) -> Any:
        def operands() -> Any:
            captured = type(site).operands(site)
            found[name] = captured.bound(captured.tensors).weight().detach().clone()
            return captured

        return operands

    for name, site in sites.items():
        site.operands = watched(name, site)  # type: ignore[method-assign]
    rows = FixedRows().next_rows(2, rank=0, world_size=1)
    engine.evaluate(rows)
    for site in sites.values():
        del site.operands
    return found


def exported_weights(single: Engine, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The staged weights that an export computes from these parameters, by site.

    Args:
        single: A `single` engine with the same recipe; its parameters are overwritten.
        parameters: All of the model, whole.
    """
    for name, parameter in single.module.model.named_parameters():
        parameter.data.copy_(parameters[name])
    model = single.module.model.eval()
    return {name: site.effective_weight().detach() for name, site in iter_sites(model)}


def save_teacher(folder: Path) -> str:
    """A tiny teacher with the student's vocabulary."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = {**MODEL, "hidden_size": 24, "intermediate_size": 40}
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_pruned(folder / "pruned")
    return str(folder)


def save_pruned(folder: Path) -> None:
    """The student with biases, and 2 of every 4 weights of its projections zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = {**MODEL, "attention_bias": True}
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.mul_(nm_mask(parameter, 2, 4))
    model.save_pretrained(folder)
