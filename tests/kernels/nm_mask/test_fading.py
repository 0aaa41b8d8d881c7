"""Masks that fade: values and gradients against the formulas, on any shape and dtype."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from leanmill.kernels.nm_mask import naive
from leanmill.kernels.nm_mask.fading import nm_fade
from tests.kernels.launcher import DEVICE


DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def masking(num_kept, group_size, left):
    return torch.tensor([num_kept, group_size, left], dtype=torch.float64)


def exact(factor, tensor):
    """Factor times tensor, rounded once."""
    return (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor).to(tensor.dtype)


@pytest.mark.parametrize("left", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "pattern"), [((5, 12), (2, 4)), ((1, 3), (1, 3)), ((2, 3, 16), (1, 8)), ((0, 4), (1, 2))]
)
def test_values_and_the_three_gradients(shape, pattern, dtype, left):
    weight, upstream = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    kept = naive.nm_mask_by_sort(weight, *pattern) | (left == 1)
    now, decay = masking(*pattern, left), torch.tensor([0.3], dtype=torch.float64, device=DEVICE)
    for options, expected in (
        ({}, upstream.double()),
        ({"decay": decay}, upstream.double() + 0.3 * ~kept * weight.double()),
        ({"masks_gradient": True}, torch.where(kept, 1.0, left) * upstream.double()),
    ):
        leaf = weight.clone().requires_grad_()
        out = nm_fade(leaf, now, **options)
        assert torch.equal(out, torch.where(kept, weight, exact(left, weight)))
        out.backward(upstream)
        torch.testing.assert_close(leaf.grad.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
        assert torch.equal(leaf.grad[kept], upstream[kept])


def test_transposable_masks_fade_too():
    weight = torch.randn(8, 12, device=DEVICE)
    out = nm_fade(weight, masking(2, 4, 0.5), transposable=True)
    assert torch.equal(out, torch.where(naive.tile_mask(weight), weight, 0.5 * weight))


def test_a_decay_is_spent_once():
    weight = torch.randn(2, 8, device=DEVICE, requires_grad=True)
    decay, now = torch.tensor([0.5], device=DEVICE), masking(1, 4, 0.25)
    (
        nm_fade(weight, now, decay=decay, spend_decay=True) + nm_fade(weight, now, decay=decay, spend_decay=True)
    ).sum().backward()
    pruned = ~naive.nm_mask_by_sort(weight.detach(), 1, 4)
    torch.testing.assert_close(weight.grad, 2 + 0.5 * pruned * weight.detach())
    assert decay.item() == 0


def test_special_values():
    weight = torch.tensor([[float("inf"), 1.0, float("nan"), 0.0], [0.0, 0.0, 0.0, 0.0]], device=DEVICE)
    plain = nm_fade(weight, masking(1, 4, 0.0))
    assert plain[0, :2].tolist() == [0.0, 0.0]
    assert plain[0, 2].isnan()
    assert plain[1].tolist() == [0.0] * 4
    finite = weight[1:].requires_grad_()
    nm_fade(finite, masking(1, 4, 0.0), masks_gradient=True).backward(torch.full((1, 4), float("nan"), device=DEVICE))
    assert finite.grad.isnan().all(), "a step that is not finite must be seen"


@pytest.mark.slow
def test_compiled_code_follows_what_the_tensor_says():
    now, weight = masking(1, 4, 1.0), torch.randn(4, 8, requires_grad=True)
    compiled = torch.compile(lambda w: nm_fade(w, now, masks_gradient=True) * 2, backend="aot_eager", fullgraph=True)
    for num_kept, group_size, left in ((1, 4, 1.0), (2, 8, 0.5), (3, 4, 0.0)):
        now.copy_(masking(num_kept, group_size, left))
        weight.grad = None
        compiled(weight).sum().backward()
        kept = naive.nm_mask_by_sort(weight.detach(), num_kept, group_size)
        torch.testing.assert_close(weight.grad, 2 * torch.where(kept, 1.0, left))


def test_each_rank_works_on_its_own_rows():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        local, now = torch.randn(3, 8), masking(1, 4, 0.5)
        mesh = init_device_mesh("cpu", (2,))
        weight = DTensor.from_local(local, mesh, [Shard(0)], run_check=False).requires_grad_()
        out = nm_fade(weight, now, masks_gradient=True)
        assert torch.equal(out.to_local(), nm_fade(local, now))
        out.backward(DTensor.from_local(torch.ones(3, 8), mesh, [Shard(0)], run_check=False))
        kept = naive.nm_mask_by_sort(local, 1, 4)
        assert torch.equal(weight.grad.to_local(), torch.where(kept, 1.0, 0.5))
    finally:
        dist.destroy_process_group()


def test_refusals():
    weight = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"masking \[2\] of torch.float32 on cpu is no N, M and c; allowed"):
        nm_fade(weight, torch.ones(2))
    with pytest.raises(ValueError, match="no whole groups of 3"):
        nm_fade(weight, masking(1, 3, 0.5))
    with pytest.raises(ValueError, match="decay .* does not fit"):
        nm_fade(weight, masking(1, 4, 0.5), decay=torch.ones(2))
