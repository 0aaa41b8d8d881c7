"""Learned thresholds against Liu et al. 2020, what pushes them, and what is counted."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.rules import StepContext
from leanmill.core.sites import iter_sites
from leanmill.core.views import Span
from leanmill.parallel.views import NativeViews
from leanmill.sparse.learned_threshold.rule import _num_kept
from leanmill.sparse.learned_threshold.stage import LearnedThreshold
from tests.core.tiny import install, loss_of, tiny, tokens
from tests.distributed import run_ranks
from tests.sparse.test_units import Held


TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 2**-6}


def papers(weight, threshold, grad):
    """Equations 4 to 8, one weight after another; a threshold of a matrix is one of each of its rows."""
    threshold = threshold.expand(weight.shape[0], 1)
    out, to_weight, to_threshold = (torch.zeros_like(t) for t in (weight, weight, threshold))
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            w, g = weight[row, column], grad[row, column]
            q = w.abs() - threshold[row, 0]
            slope = 2 - 4 * q.abs() if q.abs() <= 0.4 else 0.4 if q.abs() <= 1 else 0.0
            out[row, column] = w if q >= 0 else 0
            to_weight[row, column] = g * (q >= 0) + g * w * slope * w.sign()
            to_threshold[row, 0] -= g * w * slope
    return out, to_weight, to_threshold


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(5, 7), (1, 3), (2, 3, 5)])
def test_value_and_gradients_are_the_papers(shape, dtype):
    torch.manual_seed(0)
    weight, grad = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    stage = LearnedThreshold(weight)
    with torch.no_grad():
        # Below the largest of each row.
        stage.threshold.copy_(weight.abs().amax(-1, keepdim=True) * torch.rand_like(stage.threshold))
    out = stage(weight)
    out.backward(grad)
    flat = [t.detach().double().reshape(-1, t.shape[-1]) for t in (weight, stage.threshold, grad)]
    expected = papers(*flat)
    assert out.dtype == weight.grad.dtype == dtype
    for got, want in zip((out, weight.grad, stage.threshold.grad), expected, strict=True):
        got = got.detach().double().reshape(want.shape)
        torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(5, 7), (1, 3), (2, 3, 5)])
def test_a_matrix_may_share_its_threshold(shape, dtype):
    torch.manual_seed(0)
    weight, grad = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    stage = LearnedThreshold(weight, "matrix")
    with torch.no_grad():
        stage.threshold.copy_(weight.abs().amax((-2, -1), keepdim=True) * torch.rand_like(stage.threshold))
    out = stage(weight)
    out.backward(grad)
    assert stage.threshold.shape == (*shape[:-2], 1, 1)
    for i in range(shape[0] if len(shape) == 3 else 1):
        place = (i,) if len(shape) == 3 else (slice(None),)
        given = [t.detach().double()[place] for t in (weight, stage.threshold, grad)]
        want_out, to_weight, to_threshold = papers(*given)
        found = [t.detach().double()[place] for t in (out, weight.grad, stage.threshold.grad)]
        for got, want in zip(found, (want_out, to_weight, to_threshold.sum().reshape(1, 1)), strict=True):
            torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
    with torch.no_grad():
        stage.threshold.fill_(100.0)
    assert (stage(weight) != 0).sum() == (shape[0] if len(shape) == 3 else 1)


def test_nothing_is_pruned_at_first_and_a_row_is_never_empty():
    weight = torch.tensor([[1.0, -3.0, 3.0], [0.0, 0.0, 0.0], [float("nan"), 1.0, 2.0], [2.0, 2.0, 2.0]])
    stage = LearnedThreshold(weight)
    torch.testing.assert_close(stage(weight), weight, equal_nan=True)
    with torch.no_grad():
        stage.threshold.fill_(100.0)
    out = stage(weight.requires_grad_())
    assert out[0].tolist() == [0, -3, 3]
    assert out[2].isnan().any(), "what is no number is seen"
    assert torch.equal(out[3], weight[3])
    out[[0, 1, 3]].sum().backward()
    assert stage.threshold.grad[[0, 1, 3]].isfinite().all()


def test_the_regulariser_pushes_once_a_step_and_what_is_pruned_is_counted():
    model = tiny()
    (rule,) = install(model, {"type": "learned_threshold", "push": 0.5}).step_rules
    stages = {name: site.stages["mask"] for name, site in iter_sites(model) if site.stages}
    with torch.no_grad():
        for stage in stages.values():
            stage.threshold.uniform_(0, 0.05)
    for seed in range(2):
        loss_of(model, tokens(seed=seed)).backward()
    before = {name: stage.threshold.grad.clone() for name, stage in stages.items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    views = NativeViews(model, torch.optim.AdamW(parameters))
    now = StepContext(step=0, num_steps=2, num_micro_batches=2, views=views)
    with torch.no_grad():
        rule.before_optimizer(now)
        rule.after_optimizer(now)
    zeros = total = 0
    for name, site in iter_sites(model):
        if not site.stages:
            continue
        stage = stages[name]
        expected = before[name] - 0.5 * torch.exp(-stage.threshold.detach())
        torch.testing.assert_close(stage.threshold.grad, expected)
        zeros += int((site.effective_weight() == 0).sum())
        total += site.raw_weight.numel()
    assert zeros > 0.1 * total
    assert rule.metrics() == {"sparsity": pytest.approx(zeros / total)}
    again = install(tiny(), {"type": "learned_threshold"}).step_rules[0]
    again.load_state_dict(rule.state_dict())
    assert again.metrics() == rule.metrics()


@pytest.mark.parametrize("share", ["row", "matrix"])
@pytest.mark.parametrize("budget", [0.2, 0.8])
def test_a_budget_holds_the_push_back_and_turns_it_around(budget, share):
    model = tiny()
    (rule,) = install(model, {"type": "learned_threshold", "push": 0.5, "sparsity": budget, "share": share}).step_rules
    stages = [site.stages["mask"] for _, site in iter_sites(model) if site.stages]
    with torch.no_grad():
        for stage in stages:
            stage.threshold.fill_(0.015)  # of weights with a standard deviation of 0.02
    loss_of(model, tokens()).backward()
    before = [stage.threshold.grad.clone() for stage in stages]
    parameters = [p for p in model.parameters() if p.requires_grad]
    views = NativeViews(model, torch.optim.AdamW(parameters))
    with torch.no_grad():
        rule.before_optimizer(StepContext(step=0, num_steps=2, num_micro_batches=1, views=views))
    weights = [site.effective_weight() for _, site in iter_sites(model) if site.stages]
    pruned = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert 0.4 < pruned < 0.7
    push = 0.5 * max(-1.0, (budget - pruned) / budget)
    assert (push > 0) == (budget == 0.8)
    for stage, gradient in zip(stages, before, strict=True):
        torch.testing.assert_close(stage.threshold.grad, gradient - push * torch.exp(-stage.threshold.detach()))


def _counts_on_ranks():
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    thresholds = torch.tensor([0.0, 0.5, 1.0, 100.0, 0.2, 0.7])
    start, stop = [(0, 12), (12, 30)][dist.get_rank()]
    found = _num_kept(Held(Span((6, 5), start, stop), weight.flatten()[start:stop]), thresholds)
    stage = LearnedThreshold(weight)
    stage.threshold.data.copy_(thresholds.unsqueeze(1))
    assert found == int((stage(weight) != 0).sum())
    piece = Held(Span((6, 5), start, stop), weight.flatten()[start:stop])
    assert _num_kept(piece, torch.tensor([0.5])) == int((weight.abs() >= 0.5).sum())
    return True


def test_rows_that_lie_on_two_ranks_are_counted_once():
    assert all(run_ranks(_counts_on_ranks, 2))


def test_thresholds_are_found_by_gradient_descent():
    """Of a layer that needs half of its inputs, the other half is pruned."""
    torch.manual_seed(0)
    target = torch.randn(4, 8) * (torch.arange(8) < 4)
    layer = nn.Parameter(target + 0.1 * torch.randn(4, 8))
    stage = LearnedThreshold(layer)
    optimizer = torch.optim.SGD([layer, stage.threshold], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        ((stage(layer) - target) ** 2).sum().backward()
        stage.threshold.grad -= 0.02 * torch.exp(-stage.threshold.detach())
        optimizer.step()
    assert (stage(layer)[:, 4:] == 0).float().mean() > 0.9
    assert (stage(layer)[:, :4] - target[:, :4]).abs().mean() < 0.2


def test_a_frozen_weight_is_refused():
    with pytest.raises(ConfigError, match="learned_threshold moves .* but another technique freezes it"):
        install(tiny(), {"type": "learned_threshold"}, {"type": "lora", "rank": 2})
