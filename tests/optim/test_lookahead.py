"""Lookahead against the paper's two loops, and exact resumption in the middle of a cycle."""

import copy
from collections.abc import Callable

import pytest
import torch

from leanmill.optim.lion import Lion
from leanmill.optim.lookahead import Lookahead


INNER: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.05, fused=True),
    "lion": lambda params: Lion(params, lr=0.05, weight_decay=0.1),
}


def _params(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(5, 3), (4,)]]


def _set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("every", [1, 3])
def test_matches_the_paper(inner: str, every: int) -> None:
    params, fast = _params(), _params()
    optimizer, reference = Lookahead(INNER[inner](params), every, 0.4), INNER[inner](fast)
    slow = [p.detach().clone() for p in fast]
    for step in range(7):
        _set_gradients(params, step)
        optimizer.step()
        _set_gradients(fast, step)
        reference.step()
        if (step + 1) % every == 0:
            for phi, theta in zip(slow, fast, strict=True):
                phi += 0.4 * (theta.detach() - phi)
                theta.data.copy_(phi)
        for p, theta in zip(params, fast, strict=True):
            torch.testing.assert_close(p, theta, rtol=0, atol=1e-6)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_resumes_bitwise_anywhere_in_a_cycle(inner: str, stop_after: int) -> None:
    params = _params()
    optimizer = Lookahead(INNER[inner](params), 3, 0.5)
    for step in range(stop_after):
        _set_gradients(params, step)
        optimizer.step()
    saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    resumed = [torch.nn.Parameter(w) for w in weights]
    second = Lookahead(INNER[inner](resumed), 3, 0.5)
    second.load_state_dict(saved)
    for step in range(stop_after, 9):
        for group, opt in ((params, optimizer), (resumed, second)):
            _set_gradients(group, step)
            opt.step()
    for p, q in zip(params, resumed, strict=True):
        assert torch.equal(p, q)


def test_the_counter_survives_loading_into_low_precision_parameters() -> None:
    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = Lookahead(Lion([param], lr=1e-3), 5, 0.5)
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[param]["slow_step"].fill_(1001.0)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state[param]["slow_step"].item() == 1001.0


def test_shares_state_and_groups_with_the_inner_optimizer() -> None:
    params = _params()
    inner = INNER["adamw"](params)
    optimizer = Lookahead(inner, 2, 0.5)
    assert optimizer.state is inner.state
    assert optimizer.param_groups is inner.param_groups
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["lr"] = 0.0
    _set_gradients(params, 0)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq", "slow", "slow_step"}


def test_keeps_state_the_inner_optimizer_already_had() -> None:
    params = _params()
    inner = INNER["adamw"](params)
    _set_gradients(params, 0)
    inner.step()
    assert "exp_avg" in Lookahead(inner, 2, 0.5).state[params[0]]
