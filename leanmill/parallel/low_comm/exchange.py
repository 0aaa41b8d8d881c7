"""Means over workers, sent whole or with fewer bits, and the bytes that this takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.parallel.low_comm import four_bits


Sent = Literal["fp32", "bf16", "e3m0"]
BUCKET_NUMEL = 1 << 25
"""Elements that travel together, at most, unless one tensor has more."""


class Exchange:
    """Takes means over the ranks that hold the same parts of a model, one in every worker.

    Whole values are reduced: 2 (W - 1) / W of their bytes leave a rank. Shorter ones are gathered, W - 1 times their
    bytes, so that every worker adds up the same numbers, in the order of workers and in fp32.

    Args:
        group: One rank of each worker; None where there is one worker.
        num_workers: Of them all.
        dtype: What values travel as.
    """

    def __init__(self, group: dist.ProcessGroup | None, num_workers: int, dtype: Sent) -> None:
        self.group, self.num_workers, self.dtype = group, num_workers, dtype
        self.num_sent_bytes = 0
        """That this rank has sent, since it was made."""

    def begin(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Start to take the mean of each of `tensors`, which are not read again; the function returned waits for it.

        All workers call it together. With one worker the mean is what would have travelled.
        """
        waits = [self._begin_bucket(bucket) for bucket in _buckets(tensors)]
        return lambda: [mean for wait in waits for mean in wait()]

    def _begin_bucket(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        if self.dtype == "fp32":
            return self._begin_reduction(tensors)
        parts = [self._encoded(tensor) for tensor in tensors]
        mine = torch.cat(parts)
        everyone = mine.new_empty(self.num_workers, mine.numel())
        work = None
        if self.group is None:
            everyone[0] = mine
        else:
            work = dist.all_gather(list(everyone.unbind()), mine, group=self.group, async_op=True)
            self.num_sent_bytes += (self.num_workers - 1) * mine.numel()

        def wait() -> list[Tensor]:
            if work is not None:
                work.wait()
            columns = everyone.split([part.numel() for part in parts], dim=1)
            return [self._mean(column, tensor) for column, tensor in zip(columns, tensors, strict=True)]

        return wait

    def _begin_reduction(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        work = None
        if self.group is not None:
            work = dist.all_reduce(flat, group=self.group, async_op=True)
            self.num_sent_bytes += 2 * (self.num_workers - 1) * flat.numel() * flat.element_size() // self.num_workers

        def wait() -> list[Tensor]:
            if work is not None:
                work.wait()
            parts = flat.div_(self.num_workers).split([tensor.numel() for tensor in tensors])
            return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

        return wait

    def _encoded(self, tensor: Tensor) -> Tensor:
        if self.dtype == "e3m0":
            return four_bits.encode(tensor)
        return tensor.to(torch.bfloat16).flatten().view(torch.uint8)

    def _mean(self, rows: Tensor, like: Tensor) -> Tensor:
        """The mean of what each worker sent, uint8 [workers, bytes], shaped like a tensor."""
        total = torch.zeros(like.numel(), dtype=torch.float32, device=like.device)
        for row in rows:
            total += self._decoded(row.contiguous(), like.numel())
        return (total / self.num_workers).view(like.shape).to(like.dtype)

    def _decoded(self, row: Tensor, numel: int) -> Tensor:
        return four_bits.decode(row, numel) if self.dtype == "e3m0" else row.view(torch.bfloat16).float()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        differs = bucket and (bucket[0].dtype, bucket[0].device) != (tensor.dtype, tensor.device)
        if bucket and (differs or sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_NUMEL):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
