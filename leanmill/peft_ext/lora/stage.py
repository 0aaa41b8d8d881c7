"""A low-rank delta inside the weight, as a stage."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.facets import LearnedGrid, LowRank
from leanmill.core.operands import recomputed
from leanmill.core.product import linear
from leanmill.core.stage import Decode, Slot, Stage
from leanmill.kernels.lowrank_delta.op import lowrank_delta, lowrank_delta_linear


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
        # In fp32 whatever autocast says: the weight that is exported is the one that was trained.
        return lowrank_delta(weight, self.lora_A, self.lora_B, self.scaling)

    def product(
        self,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        grid: LearnedGrid | None,
        decode: Decode | None,
    ) -> Tensor:
        if grid is None:
            # Two thin matmuls instead of a merged weight, and no weight-sized gradient to contract.
            def on_base(rows: Tensor, kept: Tensor, b: Tensor | None) -> Tensor:
                return linear(rows, kept if decode is None else decode(kept, rows.dtype), None, b)

            base = recomputed(on_base, tokens, weight, bias)
            factors = self.lora_A.to(tokens.dtype), self.lora_B.to(tokens.dtype)
            return base + self.scaling * F.linear(F.linear(tokens, factors[0]), factors[1])
        return lowrank_delta_linear(
            tokens, weight, self.lora_A, self.lora_B, self.scaling,
            bias=None if bias is None else bias.to(tokens.dtype),
            scale=grid.scale, num_bits=grid.num_bits, grid=grid.kind, is_exact=decode is not None,
        )  # fmt: skip

    def low_rank(self) -> LowRank:
        return LowRank(a=self.lora_A.detach(), b=self.lora_B.detach(), scaling=self.scaling)

    def trained_factors(self) -> tuple[nn.Parameter, nn.Parameter, float]:
        return self.lora_A, self.lora_B, self.scaling

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling}"
