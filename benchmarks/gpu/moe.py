"""Mixtures of experts on one GPU: grouped products, and the MFU of a 1B-active/7B model beside a dense one.

Prints the ceilings of this GPU first, then two tables. Products have the loads of a router that was not balanced, and
meet a dense matmul of the same FLOPs and torch's `grouped_mm`, forward alone and with backward. The mixture is OLMoE's
shape with as many of its layers as fit, on text, routed as its router chooses; the dense model has about the
mixture's active parameters and the same rows, optimizer and precision. Under 10 minutes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kernels import copy_bytes_per_second, matmul_flops_per_second, seconds_of
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.grouped_gemm.op import grouped_gemm
from leanmill.kernels.moe_permute.op import sort_by_expert
from leanmill.plan.plan import plan
from leanmill.recipe.root import Recipe
from leanmill.trainer.run import run


RESULT = "moe_gpu.json"
LIMIT_SECONDS = 480.0
"""Runs after this are listed as not run, so that the tables are always printed."""
LEAST_OF_DENSE, MOST_OVER_TORCH = 0.8, 1.0
"""What a grouped product should reach: of the rate of a dense matmul of its FLOPs, and of the time of `grouped_mm`."""
MEMORY_SHARE = 0.92
"""Of a GPU's memory, what a plan may take."""
TEXT = {"type": "local_corpus", "max_bytes": 8_000_000}


@dataclass(frozen=True, kw_only=True)
class Size:
    """One layer of experts and its tokens."""

    hidden: int
    width: int
    num_experts: int
    top_k: int
    num_tokens: int


SIZES = {
    "olmoe_1b_7b": Size(hidden=2048, width=1024, num_experts=64, top_k=8, num_tokens=16384),
    "qwen3_30b_a3b": Size(hidden=2048, width=768, num_experts=128, top_k=8, num_tokens=8192),
}
SMALLEST = Size(hidden=32, width=16, num_experts=4, top_k=2, num_tokens=24)


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product three ways."""

    name: str
    num_flops: int
    ours: Callable[[], object]
    dense: Callable[[], object]
    """A matmul of as many rows and the same FLOPs with one weight."""
    torchs: Callable[[], object]


def products(size: Size, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Product]:
    """Gate and up, and down, of a layer of experts: forward, and forward with backward."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    # Experts that some tokens like and others that all do: loads as of a router that nothing balances.
    logits = normal(size.num_tokens, size.num_experts) + 0.5 * normal(size.num_experts)
    _, _, counts = sort_by_expert(logits.topk(size.top_k, dim=-1).indices, size.num_experts)
    offsets, num_rows = counts.cumsum(0), size.num_tokens * size.top_k
    found = []
    for name, width_in, width_out in (
        ("gate_up", size.hidden, 2 * size.width),
        ("down", size.width, size.hidden),
    ):
        rows = normal(num_rows, width_in).to(dtype).requires_grad_()
        weight = (normal(size.num_experts, width_out, width_in) * 0.02).to(dtype).requires_grad_()
        one = weight.detach()[0].clone().requires_grad_()
        ways = {
            "ours": lambda r=rows, w=weight: grouped_gemm(r, w, offsets),
            "dense": lambda r=rows, w=one: F.linear(r, w),
            "torchs": lambda r=rows, w=weight: F.grouped_mm(r, w.transpose(-2, -1), offs=offsets.to(torch.int32)),
        }
        flops = 2 * num_rows * width_in * width_out
        found.append(
            Product(name=f"{name}_forward", num_flops=flops, **{k: _forward(call) for k, call in ways.items()})
        )
        upstream = normal(num_rows, width_out).to(dtype)
        both = {k: _both(call, upstream, (rows, one if k == "dense" else weight)) for k, call in ways.items()}
        found.append(Product(name=f"{name}_forward_backward", num_flops=3 * flops, **both))
    return found


def _forward(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return call()

    return run


def _both(call: Callable[[], Tensor], upstream: Tensor, operands: tuple[Tensor, ...]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(call(), operands, upstream)


def measured(product: Product, matmul: float) -> dict[str, Any]:
    """Time a product all three ways."""
    seconds = {way: seconds_of(getattr(product, way)) for way in ("ours", "dense", "torchs")}
    of_dense, over_torch = seconds["dense"] / seconds["ours"], seconds["ours"] / seconds["torchs"]
    return {
        "ms": 1e3 * seconds["ours"],
        "dense_ms": 1e3 * seconds["dense"],
        "torch_grouped_mm_ms": 1e3 * seconds["torchs"],
        "matmul_share": product.num_flops / seconds["ours"] / matmul,
        "rate_of_dense": of_dense,
        "time_over_torch_grouped_mm": over_torch,
        "met": of_dense >= LEAST_OF_DENSE and over_torch <= MOST_OVER_TORCH,
    }


def recipe_of(model: dict[str, Any], *, device: str, small: bool = False, **changes: Any) -> Recipe:
    """A recipe of either model: rows of 4,096 tokens of text, 32,768 tokens a step, Lion, whose state is one tensor."""
    raw: dict[str, Any] = {
        "name": "moe-gpu",
        "run_dir": tempfile.mkdtemp(prefix="leanmill-moe-gpu-"),
        "device": device,
        "engine": "single",
        "model": {"config": model},
        "data": {"sequence_length": 4096, "tokenizer": {"vocab_size": 32768}, "source": TEXT},
        "optimizer": {"type": "lion", "lr": 1e-5},
        "batch": {"tokens_per_step": 32768, "tokens_per_micro_batch": 16384},
        "train": {"steps": 12, "precision": "bf16", "activation_checkpointing": "selective"},
        "log": {"every_steps": 1, "tensorboard": False, "report": False},
        "eval": {"tokens_per_domain": 4096},
    }
    if small:
        raw["data"] |= {"sequence_length": 32, "tokenizer": {"vocab_size": 300}}
        raw["batch"] = {"tokens_per_step": 64, "tokens_per_micro_batch": 32}
        raw["train"] |= {"steps": 2, "precision": "fp32"}
        raw["eval"] = {"tokens_per_domain": 32}
    return Recipe.model_validate(raw | changes)


def mixture_model(size: Size, num_layers: int, head_dim: int = 128) -> dict[str, Any]:
    """OLMoE's, 16 layers of it having 1.3B active of 6.9B parameters."""
    heads = size.hidden // head_dim
    return {
        "model_type": "olmoe",
        "hidden_size": size.hidden,
        "intermediate_size": size.width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_experts": size.num_experts,
        "num_experts_per_tok": size.top_k,
        "norm_topk_prob": False,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


def dense_model(size: Size, num_layers: int, head_dim: int = 128) -> dict[str, Any]:
    """A Llama whose MLP is as wide as the experts of a token together: the mixture's active parameters."""
    heads = size.hidden // head_dim
    return {
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.width * size.top_k,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


def layers_that_fit(size: Size, memory_bytes: int, most: int = 16) -> int:
    """How many layers of the mixture train in so much memory, by the plan."""
    for num_layers in range(most, 1, -1):
        if plan(recipe_of(mixture_model(size, num_layers), device="cuda")).peak_bytes <= MEMORY_SHARE * memory_bytes:
            return num_layers
    return 1


def trained(recipe: Recipe, matmul: float) -> dict[str, Any]:
    """Run a recipe: tokens/s and MFU over the second half of its steps, memory, and how uneven loads were."""
    lines = (run(recipe).run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(text) for text in lines]
    start, steps = records[0], [record for record in records if record["kind"] == "step"]
    late = steps[len(steps) // 2 :]
    tokens_per_second = statistics.median(record["tokens_per_second"] for record in late)
    flops = tokens_per_second * start["flops_per_token"]
    found = {
        "tokens_per_second_median": tokens_per_second,
        "model_tflops_per_second": flops / 1e12,
        "mfu_of_measured_matmul": flops / matmul,
        "peak_memory_gib": max(record["peak_memory_bytes"] for record in steps) / 2**30,
        "num_parameters": start["num_parameters"],
        "flops_per_token": start["flops_per_token"],
        "last_loss": steps[-1]["losses"]["total"],
    }
    if peak := start.get("peak_flops_per_second"):
        found["mfu_of_data_sheet"] = flops / peak
    if "experts/max_violation" in late[-1]["metrics"]:
        found["max_violation"] = late[-1]["metrics"]["experts/max_violation"]
    return found


def line(name: str, found: dict[str, Any]) -> str:
    """One row of a printed table."""
    if "error" in found:
        return f"{name:<44} {found['error']}"
    if "ms" in found:
        return (
            f"{name:<44} {found['ms']:9.3f} ms  matmul share {found['matmul_share']:.2f}  of dense "
            f"{found['rate_of_dense']:.2f}  over grouped_mm {found['time_over_torch_grouped_mm']:.2f}  "
            f"{'met' if found['met'] else 'MISSED'}"
        )
    uneven = f"  MaxVio {found['max_violation']:.2f}" if "max_violation" in found else ""
    return (
        f"{name:<44} {found['tokens_per_second_median']:9.0f} tokens/s  matmul share "
        f"{found['mfu_of_measured_matmul']:.3f}  {found['peak_memory_gib']:.1f} GiB{uneven}"
    )


def attempt(name: str, call: Callable[[], dict[str, Any]], deadline: float) -> dict[str, Any]:
    """Measure one row and print it; one that fails is reported and the rest go on."""
    if time.monotonic() > deadline:
        found: dict[str, Any] = {"error": f"not run: past {LIMIT_SECONDS:.0f} s"}
    else:
        try:
            found = call()
        except Exception as error:  # a table with one hole is worth more than none
            found = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    print(line(name, found), flush=True)
    torch.cuda.empty_cache()
    return found


def main() -> None:
    """Measure the ceilings, then products, then models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    arguments = parser.parse_args()
    deadline, device = time.monotonic() + LIMIT_SECONDS, torch.device("cuda")
    memory = torch.cuda.get_device_properties(device).total_memory
    ceilings: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "memory_gib": memory / 2**30,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton", "transformers")},
        "date": datetime.date.today().isoformat(),
        "copy_bytes_per_second": copy_bytes_per_second(),
        "matmul_bf16_flops_per_second": matmul_flops_per_second(torch.bfloat16),
    }
    print(json.dumps(ceilings, indent=2), flush=True)
    matmul = ceilings["matmul_bf16_flops_per_second"]
    figures: dict[str, Any] = {"products": {}, "models": {}}
    for name, size in SIZES.items():
        for product in products(size, device):
            row = f"{name} {product.name}"
            figures["products"][row] = attempt(row, lambda p=product: measured(p, matmul), deadline)
    size = SIZES["olmoe_1b_7b"]
    num_layers = layers_that_fit(size, memory)
    figures["num_layers"] = num_layers
    models = {"dense": dense_model(size, num_layers), "mixture": mixture_model(size, num_layers)}
    for compiled in (False, True):
        for kind, model in models.items():
            row = f"{kind}, {num_layers} layers{', compiled' if compiled else ''}"
            recipe = recipe_of(model, device="cuda")
            recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": compiled})})
            figures["models"][row] = attempt(row, lambda r=recipe: trained(r, matmul), deadline)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / RESULT).write_text(json.dumps({"ceilings": ceilings, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
