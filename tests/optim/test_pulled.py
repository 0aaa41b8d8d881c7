"""AdamW with a pull against its equations, and without one against torch's."""

import pytest
import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.parameters import PLAIN, ParamSettings
from leanmill.optim.build import build_optimizer
from leanmill.optim.config import AdamW, Lion
from leanmill.optim.pulled import PulledAdamW


SHAPES = [(7, 5), (3,), (1,)]
SETTINGS = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3}


def by_hand(weight, gradients, pulls, pull):
    (b1, b2), lr, m, v = SETTINGS["betas"], SETTINGS["lr"], torch.zeros_like(weight), torch.zeros_like(weight)
    for t, (g, p) in enumerate(zip(gradients, pulls, strict=True), start=1):
        m = b1 * m + (1 - b1) * g
        u, seen = (m + p, m + p) if pull == "update" else (m, g)
        v = b2 * v + (1 - b2) * seen**2
        beside = lr * p if pull == "weight" else 0
        step = lr / (1 - b1**t) * u / ((v / (1 - b2**t)).sqrt() + SETTINGS["eps"])
        weight = weight - lr * SETTINGS["weight_decay"] * weight - beside - step
    return weight


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-14), (torch.float32, 1e-5)])
@pytest.mark.parametrize("pull", ["update", "weight", None])
def test_matches_its_equations(pull, dtype, atol):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    starts = [p.detach().clone() for p in params]
    gradients, pulls = ([[torch.randn(s, dtype=dtype) for s in SHAPES] for _ in range(5)] for _ in range(2))
    optimizer = PulledAdamW([{"params": params, "pull": pull}], **SETTINGS)
    for param in params:
        param.grad = torch.zeros_like(param)
    for index in range(5):
        for param, gradient, p in zip(params, gradients[index], pulls[index], strict=True):
            param.grad = gradient.clone()
            if pull is not None:
                optimizer._state_of(param, optimizer.param_groups[0])["pull"].copy_(p)
        optimizer.step()
        if index == 2:  # a resume
            state = optimizer.state_dict()
            optimizer = PulledAdamW([{"params": params, "pull": pull}], **SETTINGS)
            optimizer.load_state_dict(state)
    for i, (param, start) in enumerate(zip(params, starts, strict=True)):
        expected = by_hand(start, [g[i] for g in gradients], [p[i] for p in pulls], pull)
        torch.testing.assert_close(param.detach(), expected, rtol=0, atol=atol)
    keys = {"step", "exp_avg", "exp_avg_sq"} | ({"pull"} if pull else set())
    assert set(optimizer.state[params[0]]) == keys


def test_without_a_pull_it_is_adamw():
    torch.manual_seed(0)
    mine, torchs = ([nn.Parameter(torch.full(s, 0.5, dtype=torch.float64)) for s in SHAPES] for _ in range(2))
    optimizers = [PulledAdamW(mine, **SETTINGS), torch.optim.AdamW(torchs, **SETTINGS)]
    unused = nn.Parameter(torch.ones(2))
    optimizers[0].add_param_group({"params": [unused]})
    for _ in range(4):
        for a, b in zip(mine, torchs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(mine, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    assert torch.equal(unused, torch.ones(2))
    assert unused not in optimizers[0].state


def test_a_recipe_pulls_what_a_rule_says():
    named = [("a.weight", nn.Parameter(torch.ones(4, 4))), ("b.weight", nn.Parameter(torch.ones(4, 4)))]

    def settings(name):
        return ParamSettings(pull="update") if name == "a.weight" else PLAIN

    optimizer = build_optimizer(AdamW(lr=0.5), named, settings=settings)
    assert [(group["name"], group["pull"]) for group in optimizer.param_groups] == [
        ("decay", None),
        ("decay, update pulled", "update"),
    ]
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    with pytest.raises(ConfigError, match=r"optimizer.type=lion cannot; set optimizer.type=adamw"):
        build_optimizer(Lion(lr=0.5), named, settings=settings)
