"""What the benchmarks of training steps share: one model, its data, and timing in turn."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from leanmill.data.build import TrainData, build_tokenizer, build_train_data
from leanmill.models.build import build_on_meta
from leanmill.parallel.build import build_engine
from leanmill.parallel.config import SingleEngine
from leanmill.parallel.launch import Ranks
from leanmill.recipe.root import Recipe
from leanmill.trainer.loop import Loop
from leanmill.trainer.prepare import prepare, with_precision


LLAMA_15M = {
    "model_type": "llama",
    "hidden_size": 320,
    "num_hidden_layers": 10,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "intermediate_size": 864,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
"""15.0M parameters with the 8,192-token vocabulary."""


def recipe_15m(*, precision: str = "auto", **changes: Any) -> Recipe:
    """The benchmark recipe: 15M Llama, one micro-batch of 4,096 tokens a step.

    Args:
        precision: `fp32`, `bf16`, or `auto` for what this processor computes natively.
        changes: Sections to replace.
    """
    raw: dict[str, Any] = {
        "name": "bench",
        "device": "cpu",
        "run_dir": tempfile.mkdtemp(prefix="leanmill-bench-"),
        "model": {"config": LLAMA_15M},
        "data": {"sequence_length": 512},
        "batch": {"tokens_per_step": 4096, "tokens_per_micro_batch": 4096},
        "train": {"steps": 100_000},
        "engine": "single",
        "log": {"every_steps": 10, "tensorboard": False},
    }
    recipe = Recipe.model_validate(raw | changes)
    train = recipe.train.model_copy(update={"precision": precision})
    return with_precision(recipe.model_copy(update={"train": train}), "cpu")


def autocast(recipe: Recipe) -> AbstractContextManager[Any]:
    """What a loop of one's own wraps its forward in, for the same precision."""
    return torch.autocast("cpu", torch.bfloat16) if recipe.train.precision == "bf16" else nullcontext()


def tokenizer_and_data(recipe: Recipe) -> tuple[Any, TrainData]:
    """The recipe's tokenizer and training rows."""
    tokenizer = build_tokenizer(recipe.data, seed=recipe.seed)
    return tokenizer, build_train_data(recipe.data, tokenizer, seed=recipe.seed)


def make_loop(recipe: Recipe) -> Loop:
    """A real training loop of `recipe` on one process, without observers."""
    tokenizer, data = tokenizer_and_data(recipe)
    model = build_on_meta(recipe.model, vocab_size=len(tokenizer))
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    assert isinstance(recipe.engine, SingleEngine)
    engine, _ = build_engine(recipe.engine, ranks=ranks, precision=recipe.train.precision, model_bytes=0)
    num_micro_batches = recipe.batch.tokens_per_step // recipe.batch.tokens_per_micro_batch
    prepared = prepare(recipe, model, engine, num_micro_batches=num_micro_batches)
    loop = Loop(
        recipe=recipe,
        engine=engine,
        data=data,
        step_rules=prepared.techniques.step_rules,
        observers=(),
        num_steps=recipe.train.steps or 1,
        num_micro_batches=num_micro_batches,
        save=lambda step: None,
        evaluate=lambda step: None,
    )
    loop.start()
    return loop


def stepper(loop: Loop) -> Callable[[], None]:
    """One optimizer step of `loop`, data and metering included."""

    def step() -> None:
        loop.train_step()
        loop.step += 1

    return step


def interleaved(
    steps: Mapping[str, Callable[[], float | None]], *, rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Time each step function in turn, so that drift of the machine hits all alike.

    Returns:
        Seconds of every counted step, by name: what it says itself, else those of the call.
    """
    for step in steps.values():
        for _ in range(warmup):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            took = step()
            seconds[name].append(time.perf_counter() - started if took is None else took)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], name: str, base: str) -> float:
    """Median over rounds of the pairwise ratio name / base."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))
