"""Step time of our loop against a bare PyTorch loop and transformers' Trainer: same model, same rows."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from common import autocast, interleaved, make_loop, ratio, recipe_15m, stepper, tokenizer_and_data
from machine import conditions, write_result
from options import DEFAULTS
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.recipe.root import Recipe


def hf_model(recipe: Recipe, vocab_size: int) -> nn.Module:
    """The recipe's plain transformers model."""
    raw = dict(recipe.model.config or {})
    config = AutoConfig.for_model(raw.pop("model_type"), **raw, vocab_size=vocab_size)
    config.use_cache = False
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def bare_step(recipe: Recipe) -> Callable[[], None]:
    """The shortest honest loop: autocast, cross-entropy, clip, fused AdamW."""
    tokenizer, data = tokenizer_and_data(recipe)
    model = hf_model(recipe, len(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    num_rows = recipe.batch.tokens_per_step // recipe.data.sequence_length

    def step() -> None:
        batch = data.next_rows(num_rows, rank=0, world_size=1)
        with autocast(recipe):
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def beside_trainer(recipe: Recipe, ours: Callable[[], None], num_steps: int) -> dict[str, list[float]]:
    """Time transformers' Trainer and our step in turn: ours runs at the end of each of its steps.

    The first two steps of both are left out.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    tokenizer, data = tokenizer_and_data(recipe)
    num_rows = recipe.batch.tokens_per_step // recipe.data.sequence_length
    rows = data.next_rows(num_rows * (num_steps + 2), rank=0, world_size=1)
    examples = []
    for ids, positions in zip(rows["input_ids"], rows["position_ids"], strict=True):
        # The Trainer's loss shifts labels itself.
        examples.append({"input_ids": ids, "position_ids": positions, "labels": ids})

    seconds: dict[str, list[float]] = {"trainer": [], "leanmill": []}

    class TakeTurns(TrainerCallback):
        """Ends the Trainer's step, then makes one of ours."""

        mark = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            """Called by the Trainer after its optimizer step."""
            seconds["trainer"].append(time.perf_counter() - self.mark)
            started = time.perf_counter()
            ours()
            self.mark = time.perf_counter()
            seconds["leanmill"].append(self.mark - started)

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=num_rows,
        max_steps=num_steps + 2,
        learning_rate=1e-3,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=recipe.train.precision == "bf16",
        use_cpu=True,
        optim="adamw_torch_fused",
        logging_steps=100,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = hf_model(recipe, len(tokenizer))
    Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[TakeTurns()]).train()
    return {name: values[2:] for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=DEFAULTS["step_time"]["rounds"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    arguments = parser.parse_args()
    rounds = arguments.rounds
    measured_under = conditions()
    recipe = recipe_15m(precision=arguments.precision)
    steps = {"leanmill": stepper(make_loop(recipe)), "bare": bare_step(recipe)}
    seconds = interleaved(steps, rounds=rounds)
    against_trainer = beside_trainer(recipe, steps["leanmill"], rounds)
    figures = {
        "precision": recipe.train.precision,
        "leanmill_over_bare_loop": ratio(seconds, "leanmill", "bare"),
        "leanmill_over_transformers_trainer": ratio(against_trainer, "leanmill", "trainer"),
        "leanmill_step_seconds_median": statistics.median(seconds["leanmill"]),
        "bare_step_seconds_median": statistics.median(seconds["bare"]),
        "transformers_trainer_step_seconds_median": statistics.median(against_trainer["trainer"]),
        "rounds": rounds,
    }
    write_result(f"step_time_{recipe.train.precision}", figures, measured_under)


if __name__ == "__main__":
    main()
