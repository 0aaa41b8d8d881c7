"""Lion against the paper's algorithm, written out on plain numbers."""

import pytest
import torch

from leanmill.optim.lion import Lion


def _paper(p: torch.Tensor, gradients: list[torch.Tensor], lr: float, b1: float, b2: float, wd: float) -> torch.Tensor:
    m = torch.zeros_like(p)
    for g in gradients:
        u = torch.sign(b1 * m + (1 - b1) * g)
        p = p - lr * (u + wd * p)
        m = b2 * m + (1 - b2) * g
    return p


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_matches_the_paper(weight_decay: float) -> None:
    torch.manual_seed(0)
    shapes = [(7, 5), (3,), (1,)]
    params = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    start = [p.detach().clone() for p in params]
    gradients = [[torch.randn(shape, dtype=torch.float64) for _ in range(6)] for shape in shapes]
    optimizer = Lion(params, lr=0.01, betas=(0.8, 0.95), weight_decay=weight_decay)
    for index in range(6):
        for p, g in zip(params, gradients, strict=True):
            p.grad = g[index].clone()
        optimizer.step()
    for p, p0, g in zip(params, start, gradients, strict=True):
        torch.testing.assert_close(p.detach(), _paper(p0, g, 0.01, 0.8, 0.95, weight_decay), rtol=0, atol=1e-14)


def test_state_is_one_tensor_and_parameters_without_gradient_are_left_alone() -> None:
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = Lion([used, unused], lr=0.1, weight_decay=0.5)
    used.grad = torch.tensor([1.0, -2.0, 0.0])
    optimizer.step()
    assert set(optimizer.state[used]) == {"exp_avg"}
    assert unused not in optimizer.state
    assert torch.equal(unused, torch.ones(3))
    torch.testing.assert_close(used.detach(), torch.tensor([0.85, 1.05, 0.95]))


def test_closure_returns_its_loss() -> None:
    p = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = Lion([p], lr=0.5)

    def closure() -> float:
        loss = (p**2).sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 4.0
    assert p.item() == 1.5
