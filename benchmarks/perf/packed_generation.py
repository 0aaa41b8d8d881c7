"""Packed generation on the CPU, batch 1, beside the same weights in bf16: tokens a second, and bytes of the files.

A Llama of 98M parameters with drawn weights is exported with every matrix, the shared table and head too,
ternary and int4 in groups of 128. Rounds of tokens are generated in turn by the packed model, by the same loop on the
same weights in bf16, and by transformers' own `generate` on those.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import conditions, write_result
from options import DEFAULTS

from leanmill.core.technique import InstallContext
from leanmill.export.formats import format_class
from leanmill.export.generation import Continuation, generate, plain_bf16
from leanmill.export.packed_folder import TENSORS, load
from leanmill.models.build import build_on_meta
from leanmill.models.materialise import make_materialiser
from leanmill.recipe.root import Recipe
from leanmill.trainer.prepare import install_techniques
from leanmill.trainer.rebuild import Rebuilt


LLAMA_98M = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "intermediate_size": 2304,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
EVERY_MATRIX = ["*_proj", "embed_tokens", "lm_head"]
PACKINGS: dict[str, dict[str, Any]] = {
    "ternary": {"type": "ternary", "targets": EVERY_MATRIX},
    "int4": {
        "type": "int_quant",
        "weight_bits": 4,
        "granularity": "group",
        "group_size": 128,
        "targets": EVERY_MATRIX,
    },
}
PROMPT = torch.arange(16) * 37 % 8192
NEW_TOKENS = 24
"""A round of one model: the caches of the processor see one model at a time, as in use."""


def export(packing: str, folder: Path) -> int:
    """Write a packed folder as `leanmill export` does; return the model's parameters."""
    recipe = Recipe.model_validate(
        {
            "model": {"config": LLAMA_98M},
            "techniques": [PACKINGS[packing]],
            "train": {"steps": 1},
            "data": {"sequence_length": 32},
            "batch": {"tokens_per_step": 64, "tokens_per_micro_batch": 64},
        }
    )
    model = build_on_meta(recipe.model, vocab_size=None, device_type="cpu")

    def no_teacher(path: str) -> torch.nn.Module:
        raise AssertionError(path)

    install_techniques(recipe.techniques, model, InstallContext(load_frozen_model=no_teacher, vocab_size=8192))
    make_materialiser(recipe.model, seed=0)(model)
    rebuilt = Rebuilt(model=model.eval(), recipe=recipe, step=0, versions={}, tokenizer_dir=None)
    found = format_class("hf", packing)(rebuilt, folder, "trained")
    folder.mkdir()
    found.write(folder)
    return found.check(folder).num_parameters


def rounds_of(models: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return seconds a token by model, each of a round, the models in turn."""
    for one in models.values():
        one()
    found: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, one in models.items():
            found[name].append(one())
    return found


def by_our_loop(model: Any) -> float:
    """Seconds a token after the prompt."""
    one = Continuation(model, PROMPT)
    generate([one], max_new_tokens=NEW_TOKENS, stops=frozenset())
    return statistics.mean(one.generated.seconds)


def by_transformers(model: Any) -> float:
    """Seconds a token after the prompt, by `generate`."""
    ids, seconds = PROMPT.view(1, -1), []
    for tokens in (1, NEW_TOKENS):
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        seconds.append(time.perf_counter() - started)
    return (seconds[1] - seconds[0]) / (NEW_TOKENS - 1)


def measure(packing: str, rounds: int, work: Path) -> dict[str, Any]:
    """Export, then generate in turn."""
    folder = work / packing
    num_parameters = export(packing, folder)
    packed, plain = load(folder), plain_bf16(folder)
    plain.save_pretrained(work / f"{packing}-bf16")
    seconds = rounds_of(
        {
            "packed": lambda: by_our_loop(packed),
            "bf16": lambda: by_our_loop(plain),
            "transformers": lambda: by_transformers(plain),
        },
        rounds,
    )

    def ratio(base: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds["packed"], seconds[base], strict=True))

    bf16_bytes = (work / f"{packing}-bf16/model.safetensors").stat().st_size
    return {
        "num_parameters": num_parameters,
        "tokens_per_second": {name: 1 / statistics.median(values) for name, values in seconds.items()},
        "speed_over_bf16": ratio("bf16"),
        "speed_over_transformers_bf16": ratio("transformers"),
        "file_over_bf16": (folder / TENSORS).stat().st_size / bf16_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    rounds = DEFAULTS["packed_generation"]["rounds"]
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds of each model ({rounds})")
    arguments = parser.parse_args()
    measured_under = conditions()
    with tempfile.TemporaryDirectory(prefix="leanmill-packed-") as work:
        figures: dict[str, Any] = {packing: measure(packing, arguments.rounds, Path(work)) for packing in PACKINGS}
    write_result("packed_generation", figures | {"rounds": arguments.rounds}, measured_under)


if __name__ == "__main__":
    main()
