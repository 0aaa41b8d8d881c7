"""The Sinkhorn distance against its equations, and that nothing but rows decides what is compared."""

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from leanmill.core.errors import ConfigError
from leanmill.distill.logits.config import Distill
from leanmill.distill.logits.divergence import divergence
from leanmill.distill.logits.sinkhorn import sinkhorn_cost
from leanmill.recipe.io import validate_recipe
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import VOCAB_SIZE, context, term_of, tiny, tokens


def by_hand(q, p, entropy, iterations):
    """Cui et al., eq. 7 to 11, for one batch of distributions [n, V]: entries, rows and columns spelled out."""
    cost = torch.stack([torch.stack([(one - other).abs().sum() for other in p]) for one in q])
    plan = (-cost / entropy).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum()


def distributions(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("entropy", "iterations"), [(0.1, 20), (0.5, 1), (0.02, 7)])
def test_value_and_gradient_over_tokens_that_are_there(entropy, iterations):
    student = distributions(3, 5, 11, seed=0).mul_(3).requires_grad_()
    twin = student.detach().clone().requires_grad_()
    teacher = distributions(3, 5, 11, seed=1).mul_(3).softmax(-1)
    valid = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    got = sinkhorn_cost(student.softmax(-1), teacher, valid, entropy=entropy, iterations=iterations)
    expected = [
        by_hand(twin[group][mask].softmax(-1), teacher[group][mask], entropy, iterations)
        for group, mask in enumerate(valid[:2])
    ]
    torch.testing.assert_close(got[:2], torch.stack(expected))
    assert got[2] == 0
    got.sum().backward()
    sum(expected).backward()
    torch.testing.assert_close(student.grad, twin.grad)
    assert (student.grad[~valid] == 0).all()


def test_a_token_alone_costs_twice_the_total_variation():
    student, teacher = distributions(7, 1, 11, seed=2), distributions(7, 1, 11, seed=3)
    got = sinkhorn_cost(student.softmax(-1), teacher.softmax(-1), torch.ones(7, 1).bool(), entropy=0.1, iterations=3)
    torch.testing.assert_close(got, 2 * divergence(student, teacher, kind="total_variation").squeeze(-1))


def batch_of(ids):
    labels = ids.roll(-1, 1).clone()
    labels[:, -1], labels[0, :5] = -100, -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(ids.shape[1]).expand_as(ids).contiguous()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_do_not_depend_on_micro_batches_or_chunks(dtype):
    teacher = tiny(seed=9, hidden_size=24).to(dtype)
    config = Distill(teacher="t", divergence="sinkhorn", batch_tokens=6, temperature=2.0, weight=0.7)
    batch, found = batch_of(tokens(4, 12)), {}
    for name, rows, chunk in (("whole", 4, "auto"), ("rows", 1, "auto"), ("pairs in chunks", 2, 13), ("odd", 2, 5)):
        student = tiny().to(dtype)
        module = TrainModule(student, [term_of(config, context(teacher))], 0.3, chunk).train()
        parts = [{key: value[start : start + rows] for key, value in batch.items()} for start in range(0, 4, rows)]
        losses = [module(part) for part in parts]
        sum(loss["total"] for loss in losses).backward()
        found[name] = sum(loss["distill"] for loss in losses), student.lm_head.weight.grad
    value, gradient = found.pop("whole")
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    for other, its in found.values():
        torch.testing.assert_close(other, value, **close)
        torch.testing.assert_close(its, gradient, **close)
    if dtype == torch.float32:
        q, p = ((m(batch["input_ids"]).logits.double() / 2).softmax(-1) for m in (tiny(), teacher))
        groups = [(row, slice(start, start + 6)) for row in range(4) for start in (0, 6)]
        kept = [(row, part, batch["labels"][row, part] != -100) for row, part in groups]
        expected = 4 * sum(by_hand(q[row, part][mask], p[row, part][mask], 0.1, 20) for row, part, mask in kept)
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)


def test_batches_that_do_not_fill_a_row_are_refused():
    recipe = {
        "model": {"config": {"model_type": "llama"}},
        "data": {"sequence_length": 60},
        "batch": {"tokens_per_step": 240, "tokens_per_micro_batch": 120},
        "train": {"steps": 1},
        "techniques": [{"type": "distill", "teacher": "t", "divergence": "sinkhorn"}],
    }
    with pytest.raises(ConfigError, match=r"batch_tokens=32 must divide data\.sequence_length=60; .*batch_tokens=30"):
        validate_recipe(recipe)
    with pytest.raises(ConfigError, match="does not divide the 13 tokens"):
        term_of(Distill(teacher="t", divergence="sinkhorn"), context(tiny())).prepare(batch_of(tokens(1, 13)))
    with pytest.raises(ValidationError, match=r"top_k 5 .*sinkhorn compares whole distributions"):
        Distill(teacher="t", divergence="sinkhorn", top_k=5)


def test_far_distributions_stay_finite():
    logits = torch.zeros(1, 2, VOCAB_SIZE)
    logits[0, 0, 1] = logits[0, 1, 2] = 1e4
    student = logits.clone().requires_grad_()
    cost = sinkhorn_cost(student.softmax(-1), F.one_hot(torch.tensor([[3, 4]]), VOCAB_SIZE).float(),
                         torch.ones(1, 2).bool(), entropy=1e-3, iterations=5)  # fmt: skip
    cost.sum().backward()
    torch.testing.assert_close(cost, torch.tensor([4.0]))
    assert student.grad.isfinite().all()
