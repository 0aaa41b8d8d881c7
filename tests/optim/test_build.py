"""Groups, decay, fused kernels and missing packages."""

import builtins
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.parameters import PLAIN, ParamSettings
from leanmill.optim.build import build_optimizer, decays
from leanmill.optim.config import Adam8bit, AdamW, Lion, LookaheadConfig, OptimizerConfig
from tests.distributed import run_ranks


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.q_norm = nn.Parameter(torch.ones(2, 3))
        self.input_layernorm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 4)
        self.experts = nn.Module()
        self.experts.down_proj = nn.Parameter(torch.randn(3, 6, 4))
        self.experts.down_proj_bias = nn.Parameter(torch.randn(3, 6))
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {g["name"]: sorted(names[id(p)] for p in g["params"]) for g in optimizer.param_groups}


def test_groups_hold_every_trainable_parameter_once() -> None:
    model = _Model()
    named = list(model.named_parameters(remove_duplicate=False))
    assert len(named) == 11  # the tied head appears a second time
    optimizer = build_optimizer(AdamW(lr=0.5, weight_decay=0.3), named)
    assert _names(model, optimizer) == {
        "decay": ["embed.weight", "experts.down_proj", "q_norm", "up.weight"],
        "no_decay": ["experts.down_proj_bias", "input_layernorm.bias", "input_layernorm.weight", "up.bias"],
    }
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert all(g["initial_lr"] == 0.5 and g["lr"] == 0.5 for g in optimizer.param_groups)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.embed_tokens.weight", (64, 8), True),
        ("model.layers.0.mlp.up_proj.weight", (1, 8), True),
        ("model.layers.0.mlp.up_proj.stages.delta.lora_A", (4, 8), True),
        ("model.layers.0.self_attn.k_norm.weight", (2, 8), False),
        ("model.layers.0.input_layernorm.weight", (8,), False),
        ("model.layers.0.self_attn.q_proj.bias", (8,), False),
    ],
)
def test_what_decays(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert decays(name, nn.Parameter(torch.empty(shape))) is expected


def test_adamw_is_fused_and_matches_the_formula() -> None:
    weight = torch.randn(3, 4, dtype=torch.float64)
    p = nn.Parameter(weight.clone())
    optimizer = build_optimizer(AdamW(lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2), [("up.weight", p)])
    assert optimizer.param_groups[0]["fused"]
    m = v = torch.zeros_like(weight)
    for t in range(1, 5):
        g = torch.randn_like(weight)
        p.grad = g.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        weight = weight - 0.1 * 0.2 * weight
        weight = weight - 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
    torch.testing.assert_close(p.detach(), weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [AdamW(weight_decay=0.1), Lion(), AdamW(lookahead=LookaheadConfig(every=2))])
def test_sharded_steps_equal_plain_ones(config: OptimizerConfig) -> None:
    torch.manual_seed(1)
    weights = [torch.randn(5, 3), torch.randn(1, 4), torch.randn(7)]
    gradients = [[torch.randn_like(w) for w in weights] for _ in range(4)]

    def sharded() -> list[torch.Tensor]:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        params = [nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])) for w in weights]
        return _train(config, params, [[distribute_tensor(g, mesh, [Shard(0)]) for g in row] for row in gradients])

    plain = _train(config, [nn.Parameter(w.clone()) for w in weights], gradients)
    for rank in run_ranks(sharded, 2):
        for a, b in zip(rank, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def _train(config: OptimizerConfig, params: list[nn.Parameter], gradients: list[list[Any]]) -> list[torch.Tensor]:
    optimizer = build_optimizer(config, [(f"{i}.weight", p) for i, p in enumerate(params)])
    for row in gradients:
        for p, g in zip(params, row, strict=True):
            p.grad = g.clone()
        optimizer.step()
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in params]  # type: ignore[operator]
    return [p.detach().clone() for p in full]


def test_nothing_trainable_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no parameter is trainable"):
        build_optimizer(AdamW(), [("w", nn.Parameter(torch.ones(2), requires_grad=False))])


def test_missing_torchao_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_torchao(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torchao"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torchao)
    with pytest.raises(ConfigError, match="pip install torchao"):
        build_optimizer(Adam8bit(), [("w", nn.Parameter(torch.ones(2, 2)))])


def test_adamw8bit_is_built_where_torchao_is_installed() -> None:
    pytest.importorskip("torchao")
    optimizer = build_optimizer(Adam8bit(lr=0.1), [("up.weight", nn.Parameter(torch.ones(64, 64)))])
    assert type(optimizer).__name__ == "AdamW8bit"
    assert optimizer.param_groups[0]["initial_lr"] == 0.1


def test_settings_make_groups_of_their_own() -> None:
    model = _Model()
    said = {
        "up.weight": ParamSettings(lr_factor=10.0),
        "up.bias": ParamSettings(lr_factor=10.0, weight_decay=0.2),
        "experts.down_proj": ParamSettings(lr_factor=10.0, weight_decay=0.2),
        "q_norm": ParamSettings(betas=(0.5, 0.75)),
    }
    config = AdamW(lr=0.5, weight_decay=0.3)
    optimizer = build_optimizer(config, model.named_parameters(), settings=lambda name: said.get(name, PLAIN))
    assert _names(model, optimizer) == {
        "decay": ["embed.weight"],
        "decay, betas 0.5 0.75": ["q_norm"],
        "no_decay": ["experts.down_proj_bias", "input_layernorm.bias", "input_layernorm.weight"],
        "decay, lr x 10": ["up.weight"],
        "weight_decay 0.2, lr x 10": ["experts.down_proj", "up.bias"],
    }
    groups = [(g["initial_lr"], g["weight_decay"], g["betas"]) for g in optimizer.param_groups]
    assert groups == [
        (0.5, 0.3, (0.9, 0.95)), (0.5, 0.3, (0.5, 0.75)), (0.5, 0.0, (0.9, 0.95)),
        (5.0, 0.3, (0.9, 0.95)), (5.0, 0.2, (0.9, 0.95)),
    ]  # fmt: skip
