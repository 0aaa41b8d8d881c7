"""Figures of the N:M operations on a GPU: each is bound by reading its inputs and writing its output once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kernel_case import GpuCase

from leanmill.kernels.nm_mask.op import nm_compress, nm_expand, nm_mask, nm_project


LEAST_SHARE = 0.85


def cases(device: torch.device, shape: tuple[int, int] = (8192, 8192)) -> list[GpuCase]:
    """The cases for weights of `shape` on `device`."""
    return [case for dtype in (torch.bfloat16, torch.float32) for case in _cases_of(dtype, device, shape)]


def _cases_of(dtype: torch.dtype, device: torch.device, shape: tuple[int, int]) -> list[GpuCase]:
    weight = torch.randn(shape, device=device).to(dtype)
    leaf, grad = weight.clone().requires_grad_(), torch.randn_like(weight)
    decay = torch.tensor([2e-4], device=device)
    # Its backward runs alone: the graph of one projection, used again and again.
    projected = {t: nm_project(leaf, decay=decay, transposable=t) for t in (False, True)}
    values, indices = nm_compress(weight)

    def backward(transposable: bool) -> Callable[[], object]:
        return lambda: torch.autograd.grad(projected[transposable], leaf, grad, retain_graph=True)

    size = weight.nbytes
    timed: list[tuple[str, Callable[[], object], int, float | None]] = [
        ("nm_mask 2:4", lambda: nm_mask(weight), size + weight.numel(), LEAST_SHARE),
        ("nm_project 2:4", lambda: nm_project(weight), 2 * size, LEAST_SHARE),
        ("nm_project 2:4 SR-STE backward", backward(False), 3 * size, LEAST_SHARE),
        ("nm_project transposable 2:4", lambda: nm_project(weight, transposable=True), 2 * size, LEAST_SHARE),
        ("nm_project transposable 2:4 SR-STE backward", backward(True), 3 * size, LEAST_SHARE),
        ("nm_project 2:8", lambda: nm_project(weight, 2, 8), 2 * size, LEAST_SHARE),
        ("nm_project 4:16", lambda: nm_project(weight, 4, 16), 2 * size, None),
        ("nm_compress 2:4", lambda: nm_compress(weight), size + values.nbytes + indices.nbytes, None),
        ("nm_expand 2:4", lambda: nm_expand(values, indices), size + values.nbytes + indices.nbytes, None),
    ]
    label = f"{list(shape)} {dtype}".replace("torch.", "")
    return [
        GpuCase(f"{name}, {label}", run, num_bytes=num_bytes, least_bandwidth_share=share)
        for name, run, num_bytes, share in timed
    ]
