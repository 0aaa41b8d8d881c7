"""N:M operations on DTensors: whole rows stay on their rank."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from leanmill.kernels.nm_mask.op import nm_compress, nm_expand, nm_mask, nm_project


@pytest.fixture
def mesh():
    """Two ranks of which this process is the first; nothing here communicates."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def sharded(local, mesh, placement):
    return DTensor.from_local(local, mesh, [placement], run_check=False).requires_grad_()


@pytest.mark.parametrize("transposable", [False, True])
def test_each_rank_works_on_its_own_rows(mesh, transposable):
    local, upstream = torch.randn(3, 8, 16), torch.randn(3, 8, 16)
    decay = torch.tensor([0.5])
    weight = sharded(local, mesh, Shard(0))
    out = nm_project(weight, decay=decay, transposable=transposable)
    assert isinstance(out, DTensor)
    assert out.shape == weight.shape == (6, 8, 16)
    assert out.placements == weight.placements
    assert torch.equal(out.to_local(), nm_project(local, transposable=transposable))
    mask = nm_mask(weight, transposable=transposable)
    assert torch.equal(mask.to_local(), nm_mask(local, transposable=transposable))
    out.backward(DTensor.from_local(upstream, mesh, [Shard(0)], run_check=False))
    plain = local.clone().requires_grad_()
    nm_project(plain, decay=decay, transposable=transposable).backward(upstream)
    assert torch.equal(weight.grad.to_local(), plain.grad)


def test_replicated_weights_stay_replicated(mesh):
    local = torch.randn(8, 16)
    out = nm_project(sharded(local, mesh, Replicate()), 1, 8)
    assert out.placements == (Replicate(),)
    assert torch.equal(out.to_local(), nm_project(local, 1, 8))


@pytest.mark.parametrize(("dim", "transposable"), [(1, False), (-1, False), (0, True), (1, True)])
def test_rows_cut_apart_are_refused(mesh, dim, transposable):
    weight = sharded(torch.randn(8, 16), mesh, Shard(dim % 2))
    for function in (nm_mask, nm_project):
        with pytest.raises(ValueError, match="does not hold whole rows.*redistribute"):
            function(weight, transposable=transposable)


def test_the_compressed_form_is_for_plain_tensors(mesh):
    weight = sharded(torch.randn(8, 16), mesh, Shard(0))
    with pytest.raises(ValueError, match=r"weight \[16, 16\] is a DTensor.*to_local"):
        nm_compress(weight)
    with pytest.raises(ValueError, match=r"values \[16, 16\] is a DTensor"):
        nm_expand(weight, torch.zeros(16, 4, dtype=torch.uint8))
