"""A low-rank delta inside the weight, as a stage."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from leanmill.core.stage import LowRank, Slot, Stage


class LoraStage(Stage):
    """W [..., out, in] -> W + s B A, with A [..., rank, in] and B [..., out, rank] in fp32.

    Args:
        weight: The weight it will be given: shape, device and leading (expert) dims are taken.
        rank: Inner size of the factors.
        scaling: s.
        init: How A starts; B starts at zero.
    """

    slot: ClassVar[Slot] = Slot.DELTA
    technique: ClassVar[str] = "lora"
    decayed: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    def __init__(
        self, weight: Tensor, rank: int, scaling: float, *, init: Literal["kaiming", "gaussian"] = "kaiming"
    ) -> None:
        super().__init__()
        *experts, out_features, in_features = weight.shape
        self.rank, self.scaling, self.init = rank, scaling, init
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(*experts, rank, in_features, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.empty(*experts, out_features, rank, dtype=dtype, device=weight.device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.init == "gaussian":
            self.lora_A.normal_(std=1 / self.rank)
        else:
            # Kaiming-uniform with a = sqrt(5), each expert a matrix of its own.
            bound = self.lora_A.shape[-1] ** -0.5
            self.lora_A.uniform_(-bound, bound)
        self.lora_B.zero_()

    def forward(self, weight: Tensor) -> Tensor:
        # Autocast would round the product to bf16, and the exported weight would not be the trained one.
        with torch.autocast(weight.device.type, enabled=False):
            merge = torch.addmm if weight.dim() == 2 else torch.baddbmm
            dtype = torch.promote_types(weight.dtype, self.lora_A.dtype)
            factors = self.lora_B.to(dtype), self.lora_A.to(dtype)
            return merge(weight.to(dtype), *factors, alpha=self.scaling).to(weight.dtype)

    def low_rank(self) -> LowRank:
        return LowRank(a=self.lora_A.detach(), b=self.lora_B.detach(), scaling=self.scaling)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling}"
