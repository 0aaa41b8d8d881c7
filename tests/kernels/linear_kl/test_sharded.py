"""Divergences of tokens sharded over ranks, with every form of teacher: values and gradients of one process."""

import pytest
import torch
from torch.nn import functional as F

from leanmill.kernels.linear_kl.op import (
    TeacherHead,
    TeacherLogits,
    TopK,
    linear_kl,
    linear_kl_and_cross_entropy,
)
from tests.distributed import run_ranks


CASES = [(num_tokens, source) for num_tokens in (5, 1) for source in ("head", "logits", "top_k")]


def operands(num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(12, (num_tokens,), generator=generator)
    labels[1:2] = -100
    return (draw(num_tokens, 4), draw(12, 4), draw(12)), (draw(num_tokens, 3), draw(12, 3), draw(12)), labels


def teacher_of(source, head, spread):
    """Return a teacher; `spread` places what has a row a token."""
    if source == "head":
        return TeacherHead(spread(head[0]), *head[1:])
    logits = F.linear(*head)
    if source == "logits":
        own = spread(logits)
        return TeacherLogits(lambda part: (own.to_local() if hasattr(own, "to_local") else own)[part])
    cache = TopK.of(logits, 3)
    return TopK(spread(cache.indices), spread(cache.log_probs), spread(cache.log_tail - 0.5))


def losses(student, teacher, labels):
    """Return three sets of losses as scalars, of which the first three carry gradients."""
    hidden, weight, bias = student
    weights = {"divergence_weight": 0.7, "cross_entropy_weight": 0.4}
    both = linear_kl_and_cross_entropy(hidden, weight, labels, bias, teacher=teacher, **weights)
    mean = linear_kl(*student, teacher=teacher, labels=labels, kind="js")
    every = linear_kl(*student, teacher=teacher, kind="reverse")
    return mean, every, both.total, both.divergence, both.cross_entropy


def results(student, teacher, labels):
    found = losses(student, teacher, labels)
    gradients = torch.autograd.grad(found[0] + 2 * found[1] + 3 * found[2], student)
    return [*(t.detach() for t in found), *gradients]


def on_one(num_tokens, source):
    student, head, labels = operands(num_tokens)
    teacher = teacher_of(source, head, lambda t: t)
    return results([t.requires_grad_() for t in student], teacher, labels)


def on_ranks():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))

    def spread(tensor):
        return distribute_tensor(tensor, mesh, [Shard(0)])

    found = []
    for num_tokens, source in CASES:
        (hidden, *head), theirs, labels = operands(num_tokens)
        student = [spread(hidden), *(distribute_tensor(t, mesh, [Replicate()]) for t in head)]
        teacher = teacher_of(source, theirs, spread)
        got = results([t.requires_grad_() for t in student], teacher, spread(labels))
        assert got[5].placements == student[0].placements
        found.append([t.full_tensor() for t in got])
    return found


def test_equals_one_process():
    expected = [on_one(*case) for case in CASES]
    for found in run_ranks(on_ranks, 2):
        torch.testing.assert_close(found, expected)


def refusals():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    (hidden, weight, _), theirs, _ = operands(5)
    rows = distribute_tensor(hidden, mesh, [Shard(0)])
    for changed, message in (
        (theirs[0], "teacher.hidden .* is plain"),
        (distribute_tensor(theirs[0], mesh, [Replicate()]), r"teacher.hidden.redistribute\(placements=\[Shard"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_kl(rows, weight, teacher=TeacherHead(changed, theirs[1]))
    sharded = distribute_tensor(theirs[1], mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"teacher.weight.redistribute\(placements=\[Replicate"):
        linear_kl(rows, weight, teacher=TeacherHead(distribute_tensor(theirs[0], mesh, [Shard(0)]), sharded))
    return True


def test_what_is_refused():
    assert run_ranks(refusals, 2) == [True, True]
