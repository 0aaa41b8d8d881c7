"""transformers' Trainer with our callback over the same Trainer plus the technique's own cost, 15M Llama, in turn.

The technique's own cost is what it adds to a bare loop: the attached model's forward and backward over the plain
one's, and its rules. What is left over is the callback's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved, recipe_15m, tokenizer_and_data
from machine import conditions, write_result
from options import DEFAULTS
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import leanmill
from leanmill.integrations import LeanmillCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=DEFAULTS["callback_step"]["rounds"])
    parser.add_argument("--rows", type=int, default=8, help="of 512 tokens in a step")
    parser.add_argument("--technique", default="nm_sparsity")
    arguments = parser.parse_args()
    measured_under = conditions()
    recipe = recipe_15m(precision="fp32")
    tokenizer, data = tokenizer_and_data(recipe)
    changes = {"vocab_size": len(tokenizer), "use_cache": False}
    config = AutoConfig.for_model(**dict(recipe.model.config or {}) | changes)
    rows = [{"input_ids": row, "labels": row} for row in data.next_rows(arguments.rows)["input_ids"]]
    techniques = [{"type": arguments.technique}]
    steps = {
        "trainer": of_trainer(config, rows, []),
        "trainer_with_callback": of_trainer(config, rows, techniques),
        "loop": of_loop(config, rows, []),
        "loop_with_technique": of_loop(config, rows, techniques),
    }
    seconds = interleaved(steps, rounds=arguments.rounds, warmup=1)
    rounds = zip(*(seconds[name] for name in steps), strict=True)
    ratios = [both / (plain + technique - loop) for plain, both, loop, technique in rounds]
    figures = {f"{name}_ms": 1000 * statistics.median(values) for name, values in seconds.items()}
    figures |= {"callback_over_trainer_and_technique": statistics.median(ratios), "rounds": arguments.rounds}
    write_result("callback_step", figures | {"technique": arguments.technique}, measured_under)


def build(config: Any, techniques: list[dict[str, Any]]) -> Any:
    """A model of random weights, attached to where there is something to attach."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    if techniques:
        leanmill.attach(model, techniques)
    return model


class Clock(TrainerCallback):
    """Holds the Trainer between two steps: what lies between them is a step with all of its own work."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.marks.append(time.perf_counter())


def of_trainer(config: Any, rows: list[Any], techniques: list[dict[str, Any]]) -> Callable[[], float]:
    """Two steps of the Trainer a call; returns the seconds from the first one's beginning to the second's."""
    model, clock = build(config, techniques), Clock()
    settings = TrainingArguments(
        tempfile.mkdtemp(prefix="leanmill-callback-"), per_device_train_batch_size=len(rows), max_steps=2, use_cpu=True,
        save_strategy="no", report_to="none", remove_unused_columns=False, disable_tqdm=True, logging_steps=1000,
        dataloader_pin_memory=False, lr_scheduler_type="constant",
    )  # fmt: skip
    callbacks = [clock, *([LeanmillCallback(model)] if techniques else [])]
    trainer = Trainer(model, settings, train_dataset=rows, callbacks=callbacks)

    def step() -> float:
        clock.marks.clear()
        trainer.train()
        return clock.marks[1] - clock.marks[0]

    return step


def of_loop(config: Any, rows: list[Any], techniques: list[dict[str, Any]]) -> Callable[[], None]:
    """One step of a bare loop, which clips and steps AdamW as the Trainer does."""
    model = build(config, techniques).train()
    attached = leanmill.integrations.attached_to(model) if techniques else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def step() -> None:
        if attached is not None:
            attached.begin_step(0, num_steps=2, optimizer=optimizer)
        model(**batch).loss.backward()
        if attached is not None:
            attached.before_optimizer()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if attached is not None:
            attached.after_optimizer()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
