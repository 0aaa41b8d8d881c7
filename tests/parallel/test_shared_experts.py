"""Shared experts run while tokens travel, in forward and in backward, and change nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from leanmill.core.experts import is_stacked_experts, set_dispatch, use_our_compute
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.parallel.dispatch import AllToAllDispatch
from leanmill.parallel.shared_experts import overlap_shared_experts
from tests.distributed import run_ranks
from tests.models.families import FAMILIES
from tests.parallel.dispatch_cases import keep_own_experts


QWEN = {
    **FAMILIES["qwen3_moe"],
    "num_experts": 4,
    "shared_expert_intermediate_size": 20,
    "norm_topk_prob": True,
}
HUNYUAN = {**FAMILIES["mixtral"], "head_dim": 8, "moe_topk": 2, "num_experts": 4, "num_experts_per_tok": 2}
ORDERS = {
    "qwen2_moe": QWEN,
    "deepseek_v2": FAMILIES["deepseek_v2"],
    "deepseek_v3": FAMILIES["deepseek_v3"],
}
"""Shared experts first, routed ones first, and these with a router of its own."""


def model_of(family: str, config: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**(config or FAMILIES[family])}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
        assert parameter.isfinite().all(), name
    return model.to(dtype).train()


def blocks(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    return [(block, child) for block in model.modules() for child in block.children() if is_stacked_experts(child)]


def overlapped(model: nn.Module) -> nn.Module:
    for block, experts in blocks(model):
        use_our_compute(experts, "experts", remedy="cannot be tested")
        overlap_shared_experts(block, experts)
    return model


def run(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    out = model(input_ids=ids, use_cache=False).logits
    out.tanh().sum().backward()
    return {"out": out.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("family", [*ORDERS, "ernie4_5_moe", "hunyuan_v1_moe", "mixtral"])
def test_whatever_comes_first_results_and_gradients_stay(family: str, recompute: str) -> None:
    config = {**ORDERS, "hunyuan_v1_moe": HUNYUAN}.get(family)
    ids = torch.randint(97, (2, 7))
    model = model_of(family, config)
    for _, experts in blocks(model):
        use_our_compute(experts, "experts", remedy="cannot be tested")
    expected = run(model, ids)
    model = overlapped(model_of(family, config))
    if recompute != "none":
        apply_activation_checkpointing(model, recompute)
    for one in (model, copy.deepcopy(model)):
        found = run(one, ids)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6 * max(1.0, value.abs().max().item()))
    for name, module in model.named_modules():
        if name.endswith(("shared_experts", "shared_expert", "shared_mlp")):
            tokens = torch.randn(3, 32)
            assert torch.equal(module(tokens), type(module).forward(module, tokens)), "called alone it runs at once"


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_hooks_see_what_they_return(family: str) -> None:
    """And may replace it, as ZeRO-3 does with an identity that knows when backward begins."""
    ids = torch.randint(97, (2, 7))

    def hooked(model: nn.Module, seen: list[Tensor]) -> nn.Module:
        for name, module in model.named_modules():
            if name.endswith(("shared_experts", "shared_expert")):
                module.register_forward_hook(lambda _module, _args, out: seen.append(out.detach().clone()))
                module.register_forward_hook(lambda _module, _args, out: out * 2)
        return model

    wanted: list[Tensor] = []
    found: list[Tensor] = []
    expected = run(hooked(model_of(family, ORDERS[family]), wanted), ids)
    got = run(hooked(overlapped(model_of(family, ORDERS[family])), found), ids)
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=2e-6 * max(1.0, value.abs().max().item()))


class Order(TorchDispatchMode):
    """Notes when rows begin to travel and when they are waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._travelling: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function.namespace == "_c10d_functional":
            name = function.name().partition("::")[2].partition(".")[0]
            if name == "all_to_all_single":
                self.found.append("travel")
                self._travelling.append(out)
            elif name == "wait_tensor" and any(args[0] is one for one in self._travelling):
                self.found.append("wait")
        return out


def watch(module: nn.Module, order: Order, name: str) -> None:
    """Note when `module` runs, and when its gradient comes."""

    def note(_module: nn.Module, _args: Any, out: Tensor) -> None:
        order.found.append(name)
        out.register_hook(lambda gradient: order.found.append(f"{name} back"))

    module.register_forward_hook(note)


def spread_block(family: str, num_chunks: int) -> nn.Module:
    ((block, experts), *_) = blocks(model_of(family, ORDERS[family], torch.float64))
    if dist.is_initialized():
        keep_own_experts(experts, dist.get_rank(), dist.get_world_size())
        set_dispatch(experts, AllToAllDispatch(dist.group.WORLD, 4, num_chunks=num_chunks), "experts")
        overlap_shared_experts(block, experts)
    else:
        use_our_compute(experts, "experts", remedy="cannot be tested")
    return block


def run_block(block: nn.Module, hidden: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    hidden = hidden.clone().requires_grad_()
    out = block(hidden)
    out.backward(upstream)
    return {"out": out.detach(), "hidden": hidden.grad} | {n: p.grad for n, p in block.named_parameters()}  # type: ignore[dict-item]


@pytest.mark.parametrize("num_chunks", [1, 2])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_they_run_while_tokens_travel(family: str, num_chunks: int) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, upstream = (torch.randn(2, 5, 32, generator=generator, dtype=torch.float64) for _ in range(2))

    def body() -> tuple[dict[str, Tensor], list[str]]:
        rank, order = dist.get_rank(), Order()
        block = spread_block(family, num_chunks)
        shared: Any = block.shared_expert if family == "qwen2_moe" else block.shared_experts
        watch(shared.act_fn, order, "shared")
        with order:
            found = run_block(block, hidden[rank : rank + 1], upstream[rank : rank + 1])
        return found, order.found

    results = run_ranks(body, 2)
    expected = run_block(spread_block(family, 1), hidden, upstream)
    for name, value in expected.items():
        parts = [found[name] for found, _ in results]
        is_spread = name.startswith("experts.") or name in ("out", "hidden")
        got = torch.cat(parts) if is_spread else parts[0] + parts[1]
        atol = 2e-6 * max(1.0, value.abs().max().item())  # routers decide in fp32
        torch.testing.assert_close(got, value, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
    for _, order in results:
        assert order == results[0][1]
        first_wait = order.index("wait")
        assert order[:first_wait] == ["travel"] * 2 * min(num_chunks, 2) + ["shared"]
        back = order[order.index("shared back") :]
        under_way = len([one for one in order[: -len(back)] if one == "travel"])
        arrived = len([one for one in order[: -len(back)] if one == "wait"])
        assert under_way - arrived == 2 * min(num_chunks, 2), "gradients of the first tokens are under way"
        assert set(back[1:]) == {"wait"}


@pytest.mark.slow
def test_compiled_blocks_break_their_graphs_there() -> None:
    ids = torch.randint(97, (2, 7))
    for family, config in ORDERS.items():
        expected = run(model_of(family, config), ids)
        model = overlapped(model_of(family, config))
        for layer in model.model.layers:  # type: ignore[attr-defined, union-attr]
            layer.compile(backend="aot_eager")
        found = run(model, ids)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6 * max(1.0, value.abs().max().item()))
