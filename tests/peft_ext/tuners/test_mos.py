"""Mixture of shards: places in the pools, values and gradients, and LoRA as its special case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F  # noqa: N812

import leanmill.peft_ext  # noqa: F401 (registers)
from leanmill.peft_ext.tuners.mos import MosConfig, places


L, OUT, IN = 3, 12, 8


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"proj": nn.Linear(IN, OUT), "back": nn.Linear(OUT, IN)}) for _ in range(L)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["back"](layer["proj"](x).relu())
        return x


def wrapped(**options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(Stack(), MosConfig(target_modules=["proj", "back"], **options))


def layers_of(model: Any, kind: str) -> list[Any]:
    return [layer[kind] for layer in model.base_model.model.layers]


def test_places_follow_the_paper():
    config = MosConfig(r=6, pool_rank=4, num_shards=2, private_rank=2)
    tables = [places(config, 100 + k, k, L) for k in range(L)]
    private = [set(table[:2].flatten().tolist()) for table in tables]
    public = [set(table[2:].flatten().tolist()) for table in tables]
    assert [sorted(own) for own in private] == [[4 * k, 4 * k + 1, 4 * k + 2, 4 * k + 3] for k in range(L)]
    for own in public:
        assert len(own) == 8, "drawn without replacement while there are enough"
        assert own <= set(range(12, 24))
    assert len(set(map(frozenset, public))) == L, "each layer sees a subset of its own"
    more = places(MosConfig(r=8, pool_rank=2, num_shards=2, private_rank=1), 5, 0, L)
    counts = more[1:].flatten().bincount(minlength=12)[6:]
    assert sorted(counts.tolist()) == [2, 2, 2, 2, 3, 3], "rounds, where it needs more"
    assert torch.equal(places(config, 7, 0, L), places(config, 7, 0, L))
    assert not torch.equal(places(config, 7, 0, L), places(config, 8, 0, L))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype: torch.dtype):
    model = wrapped(r=6, pool_rank=3, num_shards=2, private_rank=1, alpha=12.0, init_weights=False)
    layers = layers_of(model, "proj")
    pool_a, pool_b = (pool["default"] for pool in (layers[0].mos_pool_A, layers[0].mos_pool_B))
    assert all(layer.mos_pool_A["default"] is pool_a for layer in layers)
    assert pool_a.shape == (L * 3 * 2, IN // 2)
    assert pool_b.shape == (L * 3 * 2, OUT // 2)
    own_a, own_b = (p.detach().clone().requires_grad_() for p in (pool_a, pool_b))
    loss, expected_loss = 0.0, 0.0
    for index, layer in enumerate(layers):
        table_a, table_b = layer.mos_table_A["default"], layer.mos_table_B["default"]
        assert not torch.equal(table_a, table_b), "places of A and B are drawn apart"
        rows_a = torch.stack([torch.cat([own_a[s] for s in row]) for row in table_a])
        rows_b = torch.stack([torch.cat([own_b[s] for s in row]) for row in table_b])
        x = torch.randn(5, IN, generator=torch.Generator().manual_seed(index)).to(dtype)
        base = layer.base_layer.to(dtype)
        expected = F.linear(x, base.weight, base.bias).float() + 2.0 * x.float() @ rows_a.T @ rows_b
        out = layer(x)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=2e-2)
        torch.testing.assert_close(layer.get_delta_weight("default"), 2.0 * rows_b.T @ rows_a, rtol=1e-5, atol=1e-6)
        loss, expected_loss = loss + out.float().square().sum(), expected_loss + expected.square().sum()
    loss.backward()
    expected_loss.backward()
    bound = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 5e-2, "atol": 1.0}
    torch.testing.assert_close(pool_a.grad, own_a.grad, **bound)
    torch.testing.assert_close(pool_b.grad, own_b.grad, **bound)


def test_private_shards_of_pool_rank_are_lora():
    model = wrapped(r=2, pool_rank=2, num_shards=1, private_rank=2, init_weights=False)
    layers = layers_of(model, "proj")
    for index, layer in enumerate(layers):
        rows = slice(2 * index, 2 * index + 2)
        a, b = layer.mos_pool_A["default"][rows], layer.mos_pool_B["default"][rows].T
        torch.testing.assert_close(layer.get_delta_weight("default"), layer.scaling["default"] * b @ a)


def test_as_many_parameters_as_lora_of_pool_rank():
    trained = sum(p.numel() for p in wrapped(r=16, pool_rank=2, num_shards=4).parameters() if p.requires_grad)
    assert trained == 2 * 2 * L * (IN + OUT)


def test_a_file_holds_each_pool_once():
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(wrapped(r=4, pool_rank=2, num_shards=2))
    pools = [name for name in state if "pool" in name]
    assert len(pools) == 4
    assert len(state) - len(pools) == 2 * 2 * L


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"private_rank": 3, "pool_rank": 2}, "use 2 or less"),
        ({"private_rank": 2, "pool_rank": 2, "r": 4}, "leaves nothing of pool_rank=2 to share"),
        ({"num_shards": 5}, "num_shards=5 does not divide a side of .*proj"),
        ({"r": 0}, "at least 1"),
    ],
)
def test_what_is_refused(options: dict, expected: str):
    with pytest.raises(ValueError, match=expected):
        wrapped(**options)
