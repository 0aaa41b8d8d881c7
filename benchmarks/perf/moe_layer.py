"""A whole mixture-of-experts decoder layer, forward and backward, against transformers with each of its backends.

Mixtral's and Qwen3-MoE's layers (attention, norms, router, experts) in the proportions of the released models,
computed by ours and by transformers in turn, in fp32 and bf16, after the peak memory of each in a process of its own.
About 2 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import interleaved, ratio
from machine import conditions, write_result
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.core.experts import IMPLEMENTATION, is_stacked_experts, use_our_compute
from leanmill.core.ledger import Ledger
from leanmill.core.sites import Sites
from leanmill.moe.routing.install import decisions


ROWS, LENGTH = 4, 512
MATMUL_SIZE = 2048
LIMIT = 0.75
PEERS = ("grouped_mm", "eager")
"""`batched_mm` copies the weights of every routed token, tens of GB here, and cannot run."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FAMILIES: dict[str, dict[str, Any]] = {
    # An eighth of Mixtral-8x7B's widths.
    "mixtral": {
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    # A quarter of Qwen3-30B-A3B's widths, all of its experts.
    "qwen3_moe": {
        "hidden_size": 512,
        "moe_intermediate_size": 192,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
}


def model_of(family: str, implementation: str, dtype: torch.dtype) -> Any:
    """A model of one layer, with equal weights whatever computes its experts."""
    shape = {"num_hidden_layers": 1, "vocab_size": 64, "tie_word_embeddings": True, **FAMILIES[family]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape), attn_implementation="sdpa")
    model = model.to(dtype).train()
    if implementation != IMPLEMENTATION:
        model.config._experts_implementation = implementation
        return model
    for name, module in model.named_modules():
        if is_stacked_experts(module):
            use_our_compute(module, name, remedy="cannot be measured")
    decisions(Sites(model), Ledger())
    return model


def layer_step(family: str, implementation: str, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward of the layer: gradients of its input and of all its weights."""
    model = model_of(family, implementation, dtype)
    layer: nn.Module = model.model.layers[0]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, LENGTH, model.config.hidden_size, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(x.shape, generator=generator).to(dtype)
    positions = torch.arange(LENGTH).unsqueeze(0)
    rotary = model.model.rotary_emb(x.detach(), positions)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        out = layer(x, position_embeddings=rotary, attention_mask=None, position_ids=positions)
        (out if isinstance(out, torch.Tensor) else out[0]).backward(upstream)

    return step


def matmul(dtype: torch.dtype) -> tuple[Callable[[], None], float]:
    """One large product, as fast as torch multiplies here, and its FLOPs."""
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(dtype) for _ in range(2))
    out = torch.empty(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    return multiply, 2.0 * MATMUL_SIZE**3


def layer_flops(family: str) -> float:
    """Of the layer's products, forward and backward."""
    shape = FAMILIES[family]
    hidden, heads, kv_heads = (shape[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head_dim = shape.get("head_dim", hidden // heads)
    experts = shape.get("num_local_experts") or shape["num_experts"]
    inner = shape.get("moe_intermediate_size") or shape["intermediate_size"]
    weights = 2 * (heads + kv_heads) * head_dim * hidden + experts * hidden
    weights += shape["num_experts_per_tok"] * 3 * hidden * inner
    scores = 2 * heads * head_dim * LENGTH / 2  # causal: half of the pairs
    return 6.0 * ROWS * LENGTH * (weights + scores)


def times(family: str, precision: str, rounds: int) -> dict[str, Any]:
    """Ours, the faster of the peers and one large product in turn; the other peer is called twice."""
    dtype = DTYPES[precision]
    # The first call of a process loads and compiles.
    steps = {peer: layer_step(family, peer, dtype) for peer in PEERS}
    seconds = {peer: min(_seconds(step) for _ in range(2)) for peer, step in steps.items()}
    best = min(PEERS, key=seconds.__getitem__)
    ours = layer_step(family, IMPLEMENTATION, dtype)
    product, product_flops = matmul(dtype)
    found = interleaved({IMPLEMENTATION: ours, best: steps[best], "matmul": product}, rounds=rounds)
    medians = {name: statistics.median(of_name) for name, of_name in found.items()}
    speed = product_flops / medians.pop("matmul")
    return {
        "ratio": ratio(found, IMPLEMENTATION, best),
        "matmul_gflops": speed / 1e9,
        "layer_gflop": layer_flops(family) / 1e9,
        # The ratio cannot fall below the peer's share.
        **{f"{name}_share_of_matmul": layer_flops(family) / value / speed for name, value in medians.items()},
        "limit": LIMIT,
        "best_peer": best,
        **{f"{name}_ms": 1e3 * value for name, value in (seconds | medians).items()},
    }


def _seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def peaks(family: str, precision: str) -> dict[str, int]:
    """Most bytes that a step takes beside the weights, by implementation, each in a process of its own."""
    found = {}
    for name in (IMPLEMENTATION, *PEERS):
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found[name] = pool.apply(_own_peak, (family, name, precision))
    return found


def _own_peak(family: str, implementation: str, precision: str) -> int:
    step = layer_step(family, implementation, DTYPES[precision])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the model
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--precisions", nargs="*", default=list(DTYPES))
    arguments = parser.parse_args()
    cases = [(family, precision) for family in arguments.families for precision in arguments.precisions]
    # First: a process that is forked from one with running threads waits for them for ever.
    memory = {case: peaks(*case) for case in cases}
    measured_under, figures = conditions(), {}
    for case in cases:
        found = times(*case, arguments.rounds)
        of_case = memory[case]
        found["memory_ratio"] = of_case[IMPLEMENTATION] / of_case[found["best_peer"]]
        found |= {f"{name}_peak_mib": peak / 2**20 for name, peak in of_case.items()}
        found["conditions"] = f"{ROWS} x {LENGTH} tokens, {FAMILIES[case[0]]}"
        figures["_".join(case)] = found
        verdict = "met" if found["ratio"] <= LIMIT else "MISSED"
        print(f"{case}: {found['ratio']:.3f} of {found['best_peer']}, memory {found['memory_ratio']:.3f} {verdict}")
    write_result("moe_layer", figures, measured_under)


if __name__ == "__main__":
    main()
