"""A step of DPO beside TRL's DPOTrainer on the same pairs, 15M Llama in fp32, in turn, losses equal at every step.

Needs TRL: `pip install --no-deps trl==1.16.0` (no requirement of this project). Both train all weights by AdamW
against the model that they began with, which is asked at every step, or whose log-probabilities both have kept
before. TRL's trainer reads the pairs of our rows, tokenised, and pads them to the longest of a step; we read them
packed. Lengths of `cached` and `asked` are log-normal (sigma 0.7), so that TRL pads about half; those of `cached_equal`
leave it nothing to pad, and what packing costs is to be seen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from common import make_loop, ratio, recipe_15m, tokenizer_and_data
from datasets import Dataset
from machine import conditions, write_result
from options import DEFAULTS
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from leanmill.core.batches import Batch
from leanmill.preference.answers import PairLoss
from leanmill.trainer.loop import Loop
from leanmill.trainer.scoring import Scores


OPTIMIZER = {"type": "adamw", "lr": 1e-6, "weight_decay": 0.0, "betas": (0.9, 0.999)}
"""AdamW as the Trainer has it, at the rate that DPOConfig has."""
TOLERANCE = 1e-5
"""Nats by which the losses of a step may differ."""
WARMUP_STEPS = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=DEFAULTS["dpo_step"]["rounds"])
    parser.add_argument("--rows", type=int, default=DEFAULTS["dpo_step"]["rows"], help="of 1,024 tokens in a step")
    parser.add_argument("--cases", nargs="*", default=["cached", "asked", "cached_equal"])
    arguments = parser.parse_args()
    measured_under = conditions()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="leanmill-dpo-") as name:
        folder, figures = Path(name), {}
        for case in arguments.cases:
            figures[case] = measure(case, folder, arguments.rounds, arguments.rows)
            print(case, json.dumps(figures[case]), flush=True)
    write_result("dpo_step", {**figures, "rounds": arguments.rounds, "rows": arguments.rows}, measured_under)


def measure(case: str, folder: Path, rounds: int, rows: int) -> dict[str, float]:
    """Train both for some steps in turn and return times, their ratio, and the largest difference of losses."""
    is_cached, is_ragged = case.startswith("cached"), not case.endswith("equal")
    num_steps = rounds + WARMUP_STEPS
    loop = ours(folder / case, num_steps, rows, is_cached=is_cached, is_ragged=is_ragged)
    batches = upcoming(loop, num_steps)
    if is_cached:
        keep_reference(loop, batches)
    trainer = theirs(loop, folder / case, [pairs_of(batch) for batch in batches], is_cached=is_cached)
    turns = Turns(loop)
    trainer.add_callback(turns)
    with quiet():
        trainer.train()
    apart = max(abs(a - b) for a, b in zip(turns.losses, trainer.losses, strict=True))
    assert apart <= TOLERANCE, f"{case}: losses are {apart:.1e} apart: {turns.losses} and {trainer.losses}"
    seconds = {name: values[WARMUP_STEPS:] for name, values in turns.seconds.items()}
    tokens = [sum(padded(pairs_of(batch))) for batch in batches]
    return {
        "leanmill_over_trl": ratio(seconds, "leanmill", "trl"),
        "leanmill_ms": 1000 * statistics.median(seconds["leanmill"]),
        "trl_ms": 1000 * statistics.median(seconds["trl"]),
        "largest_difference_of_losses": apart,
        "pairs_a_step": statistics.mean(len(pairs_of(batch)) for batch in batches),
        "leanmill_padding": 1 - sum(held(batch) for batch in batches) / sum(b["labels"].numel() for b in batches),
        "trl_padding": 1 - sum(held(batch) for batch in batches) / sum(tokens),
    }


def ours(folder: Path, num_steps: int, rows: int, *, is_cached: bool, is_ragged: bool) -> Loop:
    """A loop that is about to begin, on pairs written for as many steps."""
    folder.mkdir()
    plain = recipe_15m(precision="fp32")
    tokenizer, data = tokenizer_and_data(plain)
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = AutoConfig.for_model(**dict(plain.model.config or {}) | {"vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder / "base")
    write_pairs(folder / "pairs.jsonl", tokenizer, data.next_rows(256)["input_ids"], 24 * rows * num_steps, is_ragged)
    technique: dict[str, Any] = {"type": "dpo", "beta": 0.1, "reference": str(folder / "base")}
    if is_cached:
        technique["cache_dir"] = str(folder / "reference")
    recipe = recipe_15m(
        precision="fp32",
        model={"path": str(folder / "base")},
        data={
            "task": "preference",
            "sequence_length": 1024,
            "cache_dir": str(folder / "cache"),
            "source": {"type": "hf", "path": str(folder / "pairs.jsonl"), "validation_fraction": 0.0},
            "tokenizer": {"path": str(folder / "base")},
        },
        batch={"tokens_per_step": 1024 * rows, "tokens_per_micro_batch": 1024 * rows},
        train={"steps": 100_000, "cross_entropy_weight": 0.0},
        optimizer=OPTIMIZER,
        schedule={"type": "constant", "warmup_steps": 0},
        log={"every_steps": 1000, "tensorboard": False},
        techniques=[technique],
    )
    return make_loop(recipe)


def write_pairs(path: Path, tokenizer: Any, text: torch.Tensor, num_pairs: int, is_ragged: bool) -> None:
    """Questions and two answers each, slices of the local corpus; of one length, three pairs fill a row."""
    draw, stream = random.Random(0), text.flatten()

    def piece(median: int, spread: float) -> str:
        length = min(int(draw.lognormvariate(0, spread if is_ragged else 0.0) * median) + 1, 3 * median)
        start = draw.randrange(len(stream) - length)
        return "ask " + tokenizer.decode(stream[start : start + length], skip_special_tokens=True)

    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_pairs):
            prompt, answer = (60, 110) if is_ragged else (54, 98)
            row = {"prompt": piece(prompt, 0.7), "chosen": piece(answer, 0.7), "rejected": piece(answer, 0.7)}
            file.write(json.dumps(row) + "\n")


def upcoming(loop: Loop, num_steps: int) -> list[Batch]:
    """The rows of the next steps, which are read again when their time comes."""
    position = loop.data.state_dict()
    num_rows = loop.recipe.batch.tokens_per_step // loop.recipe.data.sequence_length
    batches = [dict(loop.data.next_rows(num_rows)) for _ in range(num_steps)]
    loop.data.load_state_dict(position)
    return batches


def keep_reference(loop: Loop, batches: list[Batch]) -> None:
    """Ask the reference of all rows, as the first run with a cache does."""
    (rule,) = (rule for rule in loop.step_rules if isinstance(rule, PairLoss))
    for batch in batches:
        rule.change_batches([batch], None, Scores(loop.engine))  # type: ignore[arg-type]


def pairs_of(batch: Batch) -> list[dict[str, list[int]]]:
    """The pairs of packed rows as the other trainer has them after its own tokenising."""
    found = []
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
        for start, end in zip(starts, starts[1:], strict=False):
            if (labels[start:end] != -100).any():
                prompt = int((labels[start:end] != -100).nonzero()[0]) + 1
                found.append((ids[start : start + prompt].tolist(), answer(ids[start:end], labels[start:end], prompt)))
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for (prompt, chosen), (_, rejected) in zip(found[::2], found[1::2], strict=True)
    ]


def answer(ids: torch.Tensor, labels: torch.Tensor, prompt: int) -> list[int]:
    """Tokens of a conversation behind its prompt that are learned; what the template has after them changes nothing."""
    end = int((labels != -100).nonzero()[-1]) + 1
    assert (labels[prompt - 1 : end] != -100).all()
    return [*ids[prompt:end].tolist(), int(labels[end - 1])]


def held(batch: Batch) -> int:
    """Tokens of pairs that are input, in packed rows."""
    return sum(
        2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) - 2
        for pair in pairs_of(batch)
    )


def padded(pairs: list[dict[str, list[int]]]) -> Iterator[int]:
    """Tokens of each pair when all of a step are as long as the longest."""
    lengths = [len(pair["prompt_ids"]) + len(pair[name]) for pair in pairs for name in ("chosen_ids", "rejected_ids")]
    return (2 * max(lengths) for _ in pairs)


class PairsOfSteps(DPOTrainer):
    """TRL's trainer on pairs that are tokenised, as many a step as ours takes, and its losses to read."""

    def __init__(self, steps: list[list[dict[str, list[int]]]], **given: Any) -> None:
        self._sizes, self.losses = [len(pairs) for pairs in steps], []
        super().__init__(train_dataset=Dataset.from_list([pair for pairs in steps for pair in pairs]), **given)

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def get_train_dataloader(self) -> DataLoader[Any]:
        ends = [sum(self._sizes[: index + 1]) for index in range(len(self._sizes))]
        steps = [list(range(end - size, end)) for end, size in zip(ends, self._sizes, strict=True)]
        return DataLoader(self.train_dataset, batch_sampler=steps, collate_fn=self.data_collator)

    def compute_loss(self, *given: Any, **named: Any) -> Any:
        loss = super().compute_loss(*given, **named)
        self.losses.append(float(loss.detach()))
        return loss


def theirs(loop: Loop, folder: Path, steps: list[Any], *, is_cached: bool) -> PairsOfSteps:
    """TRL's trainer from the same weights, with the same optimizer."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    reference = None if is_cached else AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    settings = DPOConfig(
        str(folder / "trl"), max_steps=len(steps), per_device_train_batch_size=1, use_cpu=True, beta=0.1, bf16=False,
        learning_rate=OPTIMIZER["lr"], lr_scheduler_type="constant", weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999,
        max_grad_norm=loop.recipe.train.max_grad_norm, precompute_ref_log_probs=is_cached, precompute_ref_batch_size=8,
        gradient_checkpointing=False, max_length=None, save_strategy="no", report_to="none", disable_tqdm=True,
        logging_steps=1000, dataloader_pin_memory=False,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    with quiet():
        return PairsOfSteps(steps, model=model, ref_model=reference, args=settings, processing_class=tokenizer)


class Turns(TrainerCallback):
    """Lets our loop take its step before each of the Trainer's; what lies between is the Trainer's own."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.losses: list[float] = []
        self.seconds: dict[str, list[float]] = {"leanmill": [], "trl": []}
        self._left: float | None = None
        before = loop.engine.forward_backward

        def noted(batches: Any, num_valid: torch.Tensor) -> Any:
            losses = before(batches, num_valid)
            self.losses.append(float(losses["total"].detach() / num_valid))
            return losses

        loop.engine.forward_backward = noted  # type: ignore[method-assign]

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._came()
        started = time.perf_counter()
        self.loop.train_step()
        self.loop.step += 1
        self._left = time.perf_counter()
        self.seconds["leanmill"].append(self._left - started)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._came()

    def _came(self) -> None:
        if self._left is not None:
            self.seconds["trl"].append(time.perf_counter() - self._left)


def quiet() -> Any:
    """Swallow what the Trainer prints."""
    return contextlib.redirect_stdout(None)


if __name__ == "__main__":
    main()
