from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from leanmill.parallel.tensors import assign, full, global_norm, scale_to_norm
from tests.distributed import run_ranks


VALUE = torch.arange(35, dtype=torch.float32).view(7, 5)  # 7 rows over 4 ranks: uneven, one empty


def meshes() -> tuple[object, object]:
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("shard",))
    return line, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def test_assign_between_all_layouts() -> None:
    def body() -> None:
        line, grid = meshes()

        def layouts(value: Tensor) -> list[Tensor]:
            return [
                value.clone(),
                distribute_tensor(value, line, [Shard(0)], src_data_rank=None),
                distribute_tensor(value, grid, [Replicate(), Shard(0)], src_data_rank=None),
            ]

        for target in layouts(torch.zeros(7, 5)):
            for value in layouts(VALUE):
                assign(target, value)
                assert torch.equal(full(target), VALUE)
                assert torch.equal(full(value), VALUE)
                assign(target, torch.zeros(7, 5))
        with pytest.raises(ValueError, match="shape"):
            assign(target, VALUE.T)

    run_ranks(body, 4)


def test_global_norm_over_several_meshes() -> None:
    def body() -> tuple[Tensor, Tensor, list[Tensor]]:
        line, grid = meshes()
        # Contiguous copies: on one rank's layout a shard could be a view of VALUE itself.
        tensors = [
            VALUE.clone(),
            distribute_tensor(VALUE + 1, line, [Shard(0)], src_data_rank=None),
            distribute_tensor(VALUE + 2, grid, [Replicate(), Shard(0)], src_data_rank=None),
            distribute_tensor(VALUE[:2] + 3, line, [Shard(0)], src_data_rank=None),  # empty on two ranks
        ]
        before = global_norm(tensors, torch.device("cpu"))
        scale_to_norm(tensors, before, 2.0)
        return before, global_norm(tensors, torch.device("cpu")), [full(t) for t in tensors]

    whole = [VALUE, VALUE + 1, VALUE + 2, VALUE[:2] + 3]
    expected = torch.cat([t.flatten() for t in whole]).norm()
    for before, after, scaled in run_ranks(body, 4):
        torch.testing.assert_close(before, expected)
        torch.testing.assert_close(after, torch.tensor(2.0))
        for found, value in zip(scaled, whole, strict=True):
            torch.testing.assert_close(found, value * 2.0 / expected)


def test_no_gradients_have_norm_0() -> None:
    assert global_norm([], torch.device("cpu")).item() == 0.0


def test_scaling_never_enlarges() -> None:
    value = VALUE.clone()
    scale_to_norm([value], torch.tensor(0.5), 2.0)
    assert torch.equal(value, VALUE)


def test_non_finite_norms_are_seen_on_every_rank() -> None:
    def body() -> bool:
        line, _ = meshes()
        value = VALUE.clone()
        value[0, 0] = float("nan")
        tensor = distribute_tensor(value, line, [Shard(0)], src_data_rank=None)
        assert (dist.get_rank() == 0) == bool(tensor.to_local().isnan().any())
        return bool(torch.isfinite(global_norm([tensor], torch.device("cpu"))))

    assert run_ranks(body, 4) == [False] * 4
