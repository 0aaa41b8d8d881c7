"""How many floating-point operations training costs, and what share of a device's peak a run reaches.

The count is the one of PaLM's appendix B (Chowdhery et al. 2022, arXiv:2204.02311):

    FLOPs per token = 6 * N + 12 * L * H * Q * S

with N the parameters that multiply a token, L layers, H heads of Q dims, S tokens in a row: 2 FLOPs a
multiply-add, once forward and twice backward. What is *not* in it: recomputation, the optimizer, norms and
activations, the work of techniques on weights. Attention counts every pair of a row; what causality or a
document mask saves is not subtracted, as in the paper, so utilisation compares across projects.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from leanmill.core.blocks import decoder_blocks
from leanmill.core.errors import ConfigError
from leanmill.core.experts import is_stacked_experts, stacked_parameters
from leanmill.core.stage import added_parameters


PEAK_BF16_FLOPS: dict[str, float] = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}
"""Dense bf16 peak of one device, FLOP/s, by a part of `torch.cuda.get_device_name`; first match wins.
From NVIDIA's data sheets, without structured sparsity (B200: HGX, half of the sparse 4.5 PFLOP/s)."""

_MATMUL_SIZE = 1024


def flops_per_token(
    model: nn.Module, sequence_length: int, token_shares: Sequence[float] | None = None, *, further_tokens: int = 0
) -> float:
    """Return the training FLOPs (forward and backward) of one token.

    `6 * N + 12 * L * H * Q * S`, see the module's docstring. N holds every weight of at least 2 dims
    except embedding tables, which are looked up; a tied output head counts, since it multiplies. Of
    stacked experts, top_k / num_experts of the weights count. Where queries and values differ in width
    (multi-head latent attention), 2 * Q becomes their sum.

    Args:
        model: Causal LM, meta or materialised. What techniques added is not counted.
        sequence_length: S, tokens of a row.
        token_shares: Of a row's tokens, the share c that each block runs for: of its weights c count, and of its
            pairs of tokens c^2. None is all of them.
        further_tokens: How many each position predicts beside the next, see `TechniqueConfig.further_tokens`.
    """
    attention = attention_flops_per_token(model.config, sequence_length)
    further = 0.0
    if further_tokens:
        of_one = 6.0 * _matmul_parameters_of_a_further_token(model) + attention / _num_layers(model)
        further = further_tokens * of_one
    if token_shares:
        attention *= sum(share**2 for share in token_shares) / len(token_shares)
    return 6.0 * active_matmul_parameters(model, token_shares) + attention + further


def active_matmul_parameters(model: nn.Module, token_shares: Sequence[float] | None = None) -> float:
    """Return N: the weights that multiply one token, experts and blocks by the share that is used.

    A block that is several layers counts for each of them.
    """
    of_block: dict[int, float] = {}
    num_layers: list[int] | None = getattr(model.config, "num_layers_by_block", None)  # of blocks that are several
    if token_shares or num_layers:
        blocks = decoder_blocks(model)
        times = zip(token_shares or [1.0] * len(blocks), num_layers or [1] * len(blocks), strict=True)
        for block, (share, number) in zip(blocks, times, strict=True):
            of_block.update((id(module), share * number) for module in block.modules())
            # What each layer has of its own multiplies once.
            own = getattr(block, "own", None)
            of_block.update((id(module), share) for module in (own.modules() if own is not None else ()))
    skipped = {id(p) for p in added_parameters(model)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        skipped |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    else:
        skipped |= {
            id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not head.weight
        }
    return _count(model, model, skipped, of_block)


def _count(model: nn.Module, part: nn.Module, skipped: set[int], of_block: Mapping[int, float]) -> float:
    """Return the weights of `part` that multiply one token, by the share of it that modules run for."""
    total = 0.0
    for module in part.modules():
        share = _share_of_experts(model, module) * of_block.get(id(module), 1.0)
        for parameter in module.parameters(recurse=False):
            # Some routers keep a bias, which no gradient trains, as a matrix of one row.
            is_bias = parameter.shape[:1] == (1,) and not parameter.requires_grad
            if parameter.dim() >= 2 and not is_bias and id(parameter) not in skipped:
                skipped.add(id(parameter))  # a tied weight is met twice
                total += share * parameter.numel()
    return total


def _matmul_parameters_of_a_further_token(model: nn.Module) -> float:
    """Of a block like the last, of the matmul before it, and of the head again."""
    hidden_size: int = model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator, assignment]
    block = _count(model, decoder_blocks(model)[-1], {id(p) for p in added_parameters(model)}, {})
    head = model.get_output_embeddings().weight.numel()  # type: ignore[operator]
    return float(block + 2 * hidden_size**2 + head)


def _num_layers(model: nn.Module) -> int:
    found: int = model.config.num_hidden_layers  # type: ignore[union-attr, assignment]
    return found


def attention_flops_per_token(config: Any, sequence_length: int) -> float:
    """Return `12 * L * H * Q * S`: scores and weighted sum, 2 matmuls x 2 FLOPs x 3 passes; L * H may be a sum."""
    heads = config.num_attention_heads
    all_heads = sum(getattr(config, "num_attention_heads_by_layer", None) or [heads] * config.num_hidden_layers)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    query_dim = getattr(config, "qk_head_dim", None) or head_dim
    value_dim = getattr(config, "v_head_dim", None) or head_dim
    return 6.0 * all_heads * (query_dim + value_dim) * sequence_length


def _share_of_experts(model: nn.Module, module: nn.Module) -> float:
    """Share of a module's own weights that one token multiplies."""
    if not is_stacked_experts(module):
        return 1.0
    num_experts = getattr(module, stacked_parameters(module)[0]).shape[0]
    for name in ("num_experts_per_tok", "moe_topk", "top_k_experts", "num_experts_per_token"):
        top_k = getattr(model.config, name, None)
        if isinstance(top_k, int):
            return min(top_k, num_experts) / num_experts
    raise ConfigError(
        f"the config of {type(model).__name__} does not say how many experts a token uses; "
        f"set model.config.num_experts_per_tok"
    )


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float:
    """Return model FLOPs utilisation: the share of `peak_flops` that useful work reaches.

    Args:
        tokens_per_second: Throughput of the devices that `peak_flops` adds up.
        flops_per_token: See `flops_per_token`.
        peak_flops: Peak of those devices together, FLOP/s.
    """
    return tokens_per_second * flops_per_token / peak_flops


def peak_flops_per_second(device: torch.device, precision: str) -> float | None:
    """Return the peak of one rank's device in FLOP/s, or None where it is not known.

    On CUDA it is the data sheet's dense bf16 figure; fp32 runs are held against it too, as the hardware could
    have done that. On the CPU there is no useful data sheet, so the fastest of several matmuls at this
    rank's number of threads is measured once, in the run's own dtype.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part.lower() in name.lower()), None)
    if device.type == "cpu":
        return measured_matmul_flops(precision, torch.get_num_threads())
    return None


@cache
def measured_matmul_flops(precision: str, num_threads: int) -> float:
    """Time square matmuls on the CPU and return the best rate, FLOP/s.

    Args:
        precision: `bf16` or `fp32`.
        num_threads: Threads in use; a key of the cache, not set here.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Constant operands leave the run's random state alone; matmul time does not depend on values.
    left = torch.full((_MATMUL_SIZE, _MATMUL_SIZE), 0.5, dtype=dtype)
    best, spent = float("inf"), 0.0
    with torch.no_grad():
        for _ in range(8):
            started = time.perf_counter()
            # As layers call it: `matmul` of two bf16 matrices takes a path 6 times slower on CPUs without bf16 units.
            functional.linear(left, left)
            seconds = time.perf_counter() - started
            best, spent = min(best, seconds), spent + seconds
            if spent > 0.5:
                break
    return 2.0 * _MATMUL_SIZE**3 / best
