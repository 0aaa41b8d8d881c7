"""A step with distillation over the student's own step plus the teacher's forward, 15M Llama both, taken in turn."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable

import torch
from common import interleaved, make_loop, recipe_15m, stepper, tokenizer_and_data
from machine import conditions, write_result
from options import DEFAULTS
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.models.pretrained import load_frozen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=DEFAULTS["distill_step"]["rounds"])
    parser.add_argument("--divergences", nargs="*", default=["forward_kl", "js"])
    arguments = parser.parse_args()
    measured_under = conditions()
    plain = recipe_15m(precision="fp32")
    tokenizer, data = tokenizer_and_data(plain)
    folder = tempfile.mkdtemp(prefix="leanmill-teacher-")
    config = dict(plain.model.config or {}) | {"vocab_size": len(tokenizer)}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    steps = {"student": stepper(make_loop(plain)), "teacher": forward(folder, data.next_rows(8))}
    for divergence in arguments.divergences:
        technique = {"type": "distill", "teacher": folder, "divergence": divergence, "weight": 0.5}
        steps[divergence] = stepper(make_loop(recipe_15m(precision="fp32", techniques=[technique])))
    seconds = interleaved(steps, rounds=arguments.rounds, warmup=1)
    parts = [a + b for a, b in zip(seconds["student"], seconds["teacher"], strict=True)]
    figures = {f"{name}_ms": 1000 * statistics.median(values) for name, values in seconds.items()}
    for divergence in arguments.divergences:
        over = statistics.median(a / b for a, b in zip(seconds[divergence], parts, strict=True))
        figures[f"{divergence}_over_student_and_teacher"] = over
    write_result("distill_step", figures | {"rounds": arguments.rounds}, measured_under)


def forward(folder: str, rows: dict[str, torch.Tensor]) -> Callable[[], None]:
    """The teacher's whole forward of a step's 4,096 tokens, logits and all."""
    teacher = load_frozen(folder, dtype=torch.float32)

    @torch.no_grad()
    def run() -> None:
        teacher(input_ids=rows["input_ids"], position_ids=rows["position_ids"], use_cache=False)

    return run


if __name__ == "__main__":
    main()
