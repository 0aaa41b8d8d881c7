"""Outputs in huge pages: of the right kind, and asked for only where they pay."""

import ctypes

import torch

from leanmill.kernels.native import memory


class Recorder:
    def __init__(self):
        self.calls = []

    def prefer_huge_pages(self, start: ctypes.c_void_p, num_bytes: ctypes.c_int64):
        self.calls.append((start.value, num_bytes.value))


def test_only_large_outputs_ask_for_huge_pages(monkeypatch):
    monkeypatch.setattr(memory, "_LARGE_BYTES", 4096)
    library = Recorder()
    small = memory.new_like(library, torch.zeros(3, 5))
    assert (small.shape, small.dtype) == ((3, 5), torch.float32)
    assert library.calls == []
    large = memory.new_like(library, torch.zeros(64, 64), torch.int8)
    assert large.dtype == torch.int8
    assert library.calls == [(large.data_ptr(), 4096)]
