"""NOLA as a PEFT method: factors that are sums of fixed random matrices, of which only the coefficients train.

A = A0 + sum_m a_m U_m and B = sum_m b_m V_m (Koohpayegani et al. 2023, arXiv:2310.02556), with U_m, V_m of U(-1, 1).
The basis is never stored: an entry is a hash of a key and of its place (`leanmill.core.noise`), the same on CPUs and
GPUs, in forward and backward and on any number of ranks; torch's generators differ between devices. A0, which
keeps the first gradients from vanishing, is of Kaiming-uniform size and hashed too. Coefficients start at zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.utils import PeftType
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.noise import derive_seed, uniform
from leanmill.peft_ext.tuners.additive import AdditiveConfig, AdditiveLayer, AdditiveModel


_AT_ONCE = 2**22
"""Entries of the basis that exist at a time."""


@dataclass
class NolaConfig(AdditiveConfig):
    """Configuration of NOLA adapters; their `r` costs no parameters.

    Raises:
        ValueError: A value is out of range.
    """

    num_basis: int = field(default=1024, metadata={"help": "Random matrices that each factor is a sum of."})
    seed: int = field(default=0, metadata={"help": "Of the basis."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("NOLA")
        self.check_least(num_basis=1)


class NolaLayer(AdditiveLayer):
    """A linear layer with NOLA adapters."""

    adapter_layer_names = ("nola_alpha", "nola_beta")
    other_param_names = ("rank", "scaling", "dropouts", "nola_key")

    def make_containers(self) -> None:
        self.rank: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.nola_alpha, self.nola_beta = nn.ParameterDict(), nn.ParameterDict()
        self.nola_key = BufferDict(persistent=True)

    def make_adapter(self, adapter_name: str, config: NolaConfig, *, module_name: str = "", **kwargs: Any) -> None:
        self.rank[adapter_name], self.scaling[adapter_name] = config.r, config.alpha / config.r
        start = torch.zeros if config.init_weights else torch.randn
        self.nola_alpha[adapter_name] = nn.Parameter(start(config.num_basis))
        self.nola_beta[adapter_name] = nn.Parameter(start(config.num_basis))
        # Saved with the coefficients, so that a module of another name reads the same basis.
        keys = [derive_seed(config.seed, "nola", module_name, factor) for factor in "AB"]
        self.nola_key[adapter_name] = torch.tensor(keys, dtype=torch.int64)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A [r, in] and B [out, r] of an adapter, fp32."""
        keys, r = self.nola_key[adapter], self.rank[adapter]
        alpha, beta = self.nola_alpha[adapter].float(), self.nola_beta[adapter].float()
        a = combination(alpha, keys[:1], (r, self.in_features))
        b = combination(beta, keys[1:], (self.out_features, r))
        # Entries past the basis of A.
        start = basis(keys[:1], a.numel(), alpha.numel(), 1).view_as(a)
        return a + start * self.in_features**-0.5, b

    def get_delta_weight(self, adapter: str) -> Tensor:
        a, b = self.factors(adapter)
        return (self.scaling[adapter] * (b @ a)).to(self.dtype_of(adapter))

    def added(self, adapter: str, tokens: Tensor) -> Tensor:
        a, b = (factor.to(tokens.dtype) for factor in self.factors(adapter))
        return self.scaling[adapter] * F.linear(F.linear(tokens, a), b)

    def __repr__(self) -> str:
        return "nola." + super().__repr__()


class NolaModel(AdditiveModel):
    """PEFT's tuner of NOLA adapters."""

    prefix: str = "nola_"
    tuner_layer_cls = NolaLayer

    def layer_arguments(self, config: Any, adapter_name: str, target: nn.Module, key: str) -> dict[str, Any]:
        return {"module_name": key}


def basis(key: Tensor, size: int, first: int, count: int) -> Tensor:
    """Return `count` matrices of a basis from the `first` on, each of `size` entries of U(-1, 1): [count, size], fp32.

    Args:
        key: (1,) int64.
        size: Entries of a matrix.
        first: Index of the first matrix.
        count: How many.
    """
    begin, end = first * size, (first + count) * size
    dtype = torch.int32 if end < 2**31 else torch.int64
    indices = torch.arange(begin, end, dtype=dtype, device=key.device)
    return uniform(key, indices).mul_(2).sub_(1).view(count, size)


def combination(coefficients: Tensor, key: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return sum_m coefficients[m] x the basis's m-th matrix of `shape`, fp32; nothing of the basis is kept."""
    return _Combination.apply(coefficients, key, shape)  # type: ignore[no-any-return]


class _Combination(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, key: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(key)
        ctx.count = coefficients.numel()
        out = torch.zeros(shape[0] * shape[1], device=coefficients.device)
        for first, count in _pieces(ctx.count, out.numel()):
            out.addmv_(basis(key, out.numel(), first, count).t(), coefficients[first : first + count])
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (key,) = ctx.saved_tensors
        flat = gradient.reshape(-1).float()
        parts = [basis(key, flat.numel(), first, count) @ flat for first, count in _pieces(ctx.count, flat.numel())]
        return torch.cat(parts), None, None


def _pieces(count: int, size: int) -> list[tuple[int, int]]:
    step = max(1, _AT_ONCE // size)
    return [(first, min(step, count - first)) for first in range(0, count, step)]


Config, Model = NolaConfig, NolaModel
