"""Memory of training steps under techniques that save memory, beside each other and beside what `plan` says.

A 23M Llama in fp32, three steps of one micro-batch, AdamW. What is counted is the most that torch's allocator has
handed out at once for model, gradients, optimizer state and everything inside a step, so load does not matter.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch


MODEL = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 1408,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
LAYER_BYTES = 4 * (4 * 512 * 512 + 3 * 512 * 1408)
NUM_STEPS, NUM_TOKENS = 3, 128
LORA = {"type": "lora", "rank": 16, "alpha": 32}
LISA = {"type": "lisa", "num_layers": 2, "every_steps": 2}
CASES: dict[str, list[dict[str, Any]]] = {
    "lora": [LORA],
    "l4q": [LORA, {"type": "lsq", "weight_bits": 4, "granularity": "row", "weight_start": "l4q"}],
    "lisa": [LISA],
    "lisa, layers alone": [LISA | {"train_embeddings": False}],
    "galore by sketch": [{"type": "galore", "rank": 64, "every_steps": 2, "subspace": "sketch"}],
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    from machine import conditions, write_result

    measured_under = conditions()
    figures: dict[str, Any] = {"layer_bytes": LAYER_BYTES, "num_tokens": NUM_TOKENS}
    for name, techniques in CASES.items():
        figures[name] = found = measure(techniques)
        found["ratio"] = found["measured_bytes"] / found["held_bytes"]
        print(name, found, flush=True)
    lora, l4q = (figures[name]["measured_bytes"] for name in ("lora", "l4q"))
    figures["l4q_over_lora"] = l4q / lora
    write_result("adapter_memory", figures, measured_under)


def measure(techniques: list[dict[str, Any]]) -> dict[str, float]:
    """Train, and return the most bytes that lived at once and what `plan` says of them."""
    from common import recipe_15m

    from leanmill.plan.plan import plan

    recipe = recipe_15m(
        precision="fp32",
        model={"config": MODEL},
        techniques=techniques,
        data={"sequence_length": NUM_TOKENS, "tokenizer": {"vocab_size": 8192}},
        batch={"tokens_per_step": NUM_TOKENS, "tokens_per_micro_batch": NUM_TOKENS},
    )
    predicted = plan(recipe, 1)
    gc.collect()  # what the last case left behind is not to go in this one
    return {
        "held_bytes": predicted.held_bytes,
        "predicted_peak_bytes": predicted.peak_bytes,
        "measured_bytes": peak_of_tensors(lambda: steps(recipe)),
    }


def peak_of_tensors(call: Callable[[], None]) -> int:
    """Return how many bytes torch's CPU allocator has handed out at most, above what it had before."""
    with torch.autograd.profiler.profile(profile_memory=True) as profiled:
        call()
    events = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def steps(recipe: Any) -> None:
    """Build the model and make some optimizer steps."""
    from leanmill.core.rules import StepContext
    from leanmill.models.build import build_on_meta
    from leanmill.parallel.build import build_engine
    from leanmill.parallel.launch import Ranks
    from leanmill.trainer.prepare import prepare

    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    model = build_on_meta(recipe.model, vocab_size=8192, device_type="cpu")
    engine, _ = build_engine(recipe.engine, ranks=ranks, precision=recipe.train.precision, model_bytes=0)
    rules = prepare(recipe, model, engine, num_micro_batches=1).techniques.step_rules
    ids = torch.arange(NUM_TOKENS)[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": ids}
    for step in range(NUM_STEPS):
        with torch.no_grad():
            context = StepContext(step=step, num_steps=NUM_STEPS, num_micro_batches=1, views=engine.views)
            for rule in rules:
                rule.begin_step(context)
            with torch.enable_grad():
                engine.forward_backward([batch], torch.tensor(float(NUM_TOKENS)))
            for rule in rules:
                rule.before_optimizer(context)
            engine.clip(1.0)
            skip = torch.tensor(False)
            engine.step(skip)
            for rule in rules:
                rule.after_optimizer(StepContext(**{**vars(context), "skipped": skip}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
