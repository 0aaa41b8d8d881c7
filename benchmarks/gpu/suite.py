"""Parity of CPU and GPU losses on one recipe, and throughput of a dense 1B Llama on one GPU."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from leanmill.recipe.root import Recipe
from leanmill.trainer.run import run


TINY = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 352,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
LLAMA_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
PARITY_TOLERANCE_NATS = 2e-3
"""fp32 with TF32 off; what remains is the order of summation, amplified over the steps."""


def losses_and_records(recipe: Recipe) -> list[dict[str, Any]]:
    """Run a recipe and return its step records."""
    result = run(recipe)
    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def base(name: str, **changes: Any) -> Recipe:
    """A recipe on the local corpus with no checkpoints worth speaking of."""
    raw: dict[str, Any] = {
        "name": name,
        "run_dir": tempfile.mkdtemp(prefix=f"leanmill-{name}-"),
        "engine": "single",
        "data": {"sequence_length": 256, "source": {"type": "local_corpus", "max_bytes": 4_000_000}},
        "log": {"every_steps": 1, "tensorboard": False, "report": False},
        "eval": {"tokens_per_domain": 8192},
    }
    return Recipe.model_validate(raw | changes)


def parity() -> dict[str, Any]:
    """Largest difference of training losses between CPU and GPU over 10 fp32 steps, by techniques."""
    torch.backends.cuda.matmul.allow_tf32 = False
    cases = {
        "dense": [],
        "nm_sparsity": [{"type": "nm_sparsity"}],
        "ternary": [{"type": "ternary"}],
        "nm_sparsity+ternary+lora": [{"type": "nm_sparsity"}, {"type": "ternary"}, {"type": "lora", "rank": 8}],
    }
    figures = {}
    for name, techniques in cases.items():
        curves = {}
        for device in ("cpu", "cuda"):
            recipe = base(
                f"parity-{device}",
                device=device,
                model={"config": TINY, "attention": "sdpa"},
                techniques=techniques,
                batch={"tokens_per_step": 2048, "tokens_per_micro_batch": 1024},
                train={"steps": 10, "precision": "fp32"},
            )
            curves[device] = [record["losses"]["total"] for record in losses_and_records(recipe)]
        worst = max(abs(a - b) for a, b in zip(curves["cpu"], curves["cuda"], strict=True))
        figures[name] = {"worst_difference_nats": worst, "ok": worst < PARITY_TOLERANCE_NATS}
    return figures


def throughput(compiled: bool, techniques: list[dict[str, Any]]) -> dict[str, Any]:
    """Median tokens/s, MFU and peak memory of the 1B model over the last 10 of 20 steps."""
    recipe = base(
        "dense-1b",
        device="cuda",
        model={"config": LLAMA_1B},
        techniques=techniques,
        data={
            "sequence_length": 4096,
            "tokenizer": {"vocab_size": 32768},
            "source": {"type": "local_corpus", "max_bytes": 24_000_000},
        },
        batch={"tokens_per_step": 65536, "tokens_per_micro_batch": 16384},
        train={"steps": 20, "precision": "bf16", "compile": compiled},
    )
    records = losses_and_records(recipe)[-10:]
    start = json.loads((Path(recipe.run_dir) / "metrics.jsonl").read_text().splitlines()[0])
    tokens_per_second = statistics.median(record["tokens_per_second"] for record in records)
    return {
        "tokens_per_second_median": tokens_per_second,
        "model_tflops_per_second": tokens_per_second * start["flops_per_token"] / 1e12,
        "mfu_of_measured_matmul_peak": tokens_per_second * start["flops_per_token"] / matmul_peak(),
        "peak_memory_gib": max(record["peak_memory_bytes"] for record in records) / 2**30,
        "num_parameters": start["num_parameters"],
        "last_loss": records[-1]["losses"]["total"],
    }


def matmul_peak() -> float:
    """FLOP/s of an 8192 x 8192 x 8192 bf16 matmul here, the honest ceiling."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        a @ b
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (start.elapsed_time(end) / 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    import transformers

    results = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": datetime.date.today().isoformat(),
        "matmul_peak_tflops": matmul_peak() / 1e12,
        "parity": parity(),
        "dense_1b": throughput(False, []),
        "dense_1b_compiled": throughput(True, []),
        "nm_sparsity_1b_compiled": throughput(True, [{"type": "nm_sparsity"}]),
        "ternary_1b_compiled": throughput(True, [{"type": "ternary"}]),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
