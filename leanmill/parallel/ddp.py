"""Data parallelism with a replica on every rank."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leanmill.core.batches import Batch
from leanmill.parallel.config import DdpEngine as DdpConfig
from leanmill.parallel.engine import Losses, Preparation
from leanmill.parallel.expert_parallel import is_spread, replicated_experts, spread_experts
from leanmill.parallel.fssdp import OwnedExperts
from leanmill.parallel.launch import Ranks, ensure_process_group
from leanmill.parallel.layout import Layout
from leanmill.parallel.single import freeze
from leanmill.parallel.spread_reduction import SpreadReduction
from leanmill.parallel.staging import ReplicaStaging
from leanmill.parallel.torch_engine import TorchEngine


_BUCKET_BYTES = 25 << 20
"""Of gradients of a pipeline's stage that are reduced at once: that of DDP."""
# Renamed in torch 2.13, where the old spelling warns.
_SIGNATURE = inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _SIGNATURE else "broadcast_buffers": False
}


class DdpEngine(TorchEngine):
    """Replicas whose gradients are averaged in the last micro-batch's backward. bf16 is autocast.

    What a layout spreads over ranks (experts, parts of matmuls) has replicas on some ranks only, which average it
    among themselves.

    Args:
        config: The recipe's engine section.
        ranks: Which process this is.
        precision: Compute precision.
        layout: Of the run; None spreads nothing.
    """

    name = "ddp"
    waits_between = False

    def __init__(
        self,
        config: DdpConfig,
        *,
        ranks: Ranks,
        precision: Literal["fp32", "bf16"],
        layout: Layout | None = None,
    ) -> None:
        ensure_process_group(ranks)
        super().__init__(ranks=ranks, precision=precision, layout=layout)
        self.config = config
        self._replica: nn.Module | None = None
        self._spread = SpreadReduction((), None)
        self._left_out: set[int] = set()

    def prepare(self, module: nn.Module, preparation: Preparation) -> None:
        self._cut(module, preparation)
        if self.layout.fully_sharded is not None:
            self._owned = OwnedExperts(module.model, self.layout)  # type: ignore[arg-type]
        elif self.layout.ep > 1:
            spread_experts(module.model, self.layout, *replicated_experts(self.layout))  # type: ignore[arg-type]
        self._split_matmuls(module, replicated=True)
        self._rows.prepare(module.model)  # type: ignore[arg-type]
        self.staging = ReplicaStaging(self._staged_once(module, self.config.staging), self.precision)
        preparation.materialise(module)
        self.module = module.to(self.device)
        own = [p for weight in self.staging.weights for p in weight.own]
        if self._owned is not None:
            own += self._owned.parameters()
        elif self.layout.ep > 1 or self.layout.tp > 1:
            spread = [p for p in self.module.parameters() if is_spread(p)]
            staged = {id(p) for p in own}
            group = self.layout.token_group or self.layout.experts.get_group("replicate")
            self._spread = SpreadReduction([p for p in spread if p.requires_grad and id(p) not in staged], group)
            own += spread
        _leave_out(self.module, own)
        self._left_out = {id(p) for p in own}
        self._make_optimizer(preparation)

    def _reduce_stage(self) -> None:
        # Not DDP's reducer, which waits for one backward, where those of several micro-batches are under way.
        group = self.layout.data_group
        if group is None or group.size() == 1:
            return
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat, group=group)
            flat /= group.size()
            for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    @property
    def _replicated(self) -> nn.Module:
        """The wrapper, made when a step begins: its buckets are for the parameters that train in it.

        The module itself where none do, for which DDP raises: a family whose norms have no weights, say, beside
        matmuls that ranks share.
        """
        if self._replica is None:
            reduces = any(p.requires_grad and id(p) not in self._left_out for p in self.module.parameters())
            self._replica = self._wrapped() if reduces else self.module
        return self._replica

    def _wrapped(self) -> DistributedDataParallel:
        return DistributedDataParallel(
            self.module,
            # Materialised values are equal on all ranks, and no layer of a causal LM trains its
            # buffers; gloo could not broadcast every dtype either.
            init_sync=False,
            gradient_as_bucket_view=True,
            process_group=self.layout.token_group or self.layout.inside,
            **_NO_BUFFERS,
        )

    def _trainable_changed(self) -> None:
        # Its hooks and buckets go with it; it would wait for gradients of parameters that rest.
        self._replica = None

    @contextmanager
    def _micro_batch(self, *, is_last: bool) -> Iterator[None]:
        replica = self._replicated
        waits = not is_last and isinstance(replica, DistributedDataParallel)
        with replica.no_sync() if waits else nullcontext():  # type: ignore[operator]
            if is_last:
                self._spread.begin()
            yield
        if is_last:
            self._spread.finish()

    def _train_forward(self, batch: Batch) -> Losses:
        return self._replicated(batch)  # type: ignore[no-any-return]

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        return freeze(model, self.precision).to(self.device)

    def close(self) -> None:
        super().close()
        self._replica = None


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield gradients of one dtype together, up to `_BUCKET_BYTES`."""
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        bucket: list[Tensor] = []
        for gradient in (g for g in gradients if g.dtype == dtype):
            bucket.append(gradient)
            if sum(g.nbytes for g in bucket) >= _BUCKET_BYTES:
                yield bucket
                bucket = []
        if bucket:
            yield bucket


def _leave_out(module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Have DDP wait for no gradient of `parameters`: theirs come from reduced ones."""
    left_out = {id(p) for p in parameters}
    names = [name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in left_out]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
