"""Which code computes an operation, and that it is said."""

import logging

import pytest
import torch

from leanmill.kernels import dispatch
from leanmill.kernels.dispatch import Code, choose, fastest, implementation
from leanmill.kernels.nm_mask.op import nm_mask


def there() -> bool:
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_cpu_tensors_of_known_types_run_in_c(dtype):
    assert fastest(torch.nn.Parameter(torch.ones(3, dtype=dtype)), c=there) is Code.C


@pytest.mark.parametrize(
    ("tensors", "c"),
    [
        ((torch.ones(3),), None),
        ((torch.ones(3),), lambda: False),
        ((torch.ones(3, dtype=torch.float64),), there),
        ((torch.ones(3), torch.ones(3, dtype=torch.float64)), there),
        ((torch.ones(3, device="meta"),), there),
    ],
)
def test_the_rest_runs_as_tensor_code(tensors, c):
    assert fastest(*tensors, c=c) is Code.TENSORS


def test_integers_do_not_decide():
    assert fastest(torch.ones(3, dtype=torch.int64), torch.ones(3), c=there) is Code.C


def test_a_subclass_is_left_to_tensor_code():
    class Other(torch.Tensor):
        pass

    assert fastest(torch.ones(3).as_subclass(Other), c=there) is Code.TENSORS


def test_the_gpu_runs_triton_where_it_is_there(monkeypatch):
    class OnGpu:
        """What the choice looks at; this machine may have no such device."""

        dtype, device = torch.bfloat16, torch.device("cuda", 0)

        def is_floating_point(self) -> bool:
            return True

    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    assert fastest(OnGpu(), c=there) is Code.TRITON
    assert fastest(OnGpu(), c=there, triton=lambda: False) is Code.TENSORS
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert fastest(OnGpu(), c=there) is Code.TENSORS
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert fastest(OnGpu(), c=there) is Code.TENSORS


def test_code_is_a_file_of_the_folder():
    module = implementation("leanmill.kernels.nm_mask", Code.TENSORS)
    assert module.__name__ == "leanmill.kernels.nm_mask.naive"


def test_the_path_is_said_once_and_slow_code_to_everybody(caplog):
    dispatch.log_path.cache_clear()
    with caplog.at_level(logging.DEBUG, logger=dispatch.__name__):
        for _ in range(3):
            nm_mask(torch.randn(4))
            nm_mask(torch.randn(4).double())
    assert [(record.getMessage(), record.levelno) for record in caplog.records] == [
        ("nm_mask runs as C", logging.DEBUG),
        ("nm_mask runs as tensor code for torch.float64 on cpu", logging.INFO),
    ]


def test_choosing_returns_what_is_fastest():
    assert choose("anything", torch.ones(3), c=there) is Code.C
