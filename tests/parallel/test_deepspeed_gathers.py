"""What ZeRO-3 does around modules is hidden from modes that count operators."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from leanmill.parallel.deepspeed_gathers import gather_unseen


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_gathers_are_not_counted() -> None:
    weight = torch.ones(3)
    around = {
        f"{when}_sub_module_{way}_function": lambda module: weight.mul_(2)
        for when in ("pre", "post")
        for way in ("forward", "backward")
    }
    optimizer = SimpleNamespace(parameter_offload=SimpleNamespace(**around))
    gather_unseen(optimizer)
    with Counting() as counting:
        for name in around:
            getattr(optimizer.parameter_offload, name)(None)
        _ = weight + 1
    assert counting.seen == ["add"]
    assert weight.tolist() == [16.0] * 3
