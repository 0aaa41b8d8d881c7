"""Adapters with a core between two factors, dW = s B N A, as one PEFT method: LoRA-XS, LoRA-SB, MoSLoRA, NLoRA.

A is [r, in], B [out, r] and the core N [r, r]; s = alpha / r. The methods differ in what the three start from and which
of them train:

| variant | A, B start as | N starts as | trains |
|---|---|---|---|
| `lora_xs` | the weight's largest singular vectors: A = V^T, B = U S | normal, sigma 1e-5 | N |
| `lora_sb` | those of the first step of full fine-tuning: A = V^T, B = U | S / s of that step | N |
| `moslora` | A Kaiming, B zero | `mixer`: orthogonal or Kaiming | all |
| `nlora` | rows and columns of the weight (Nystroem) | the pseudo-inverse of their corner | all |
| `int_tune` | as `nlora` | as `nlora` | N |

`nlora` and `int_tune` start with a product that is not zero. It is taken off again, dW = s (B N A - B0 N0 A0), so
that every variant but `lora_sb` starts as the base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.utils import PeftType
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.peft_ext.tuners.additive import AdditiveConfig, AdditiveModel
from leanmill.peft_ext.tuners.collecting import CollectingLayer


Variant = Literal["lora_xs", "lora_sb", "moslora", "nlora", "int_tune"]
_TRAINS_CORE_ALONE = ("lora_xs", "lora_sb", "int_tune")
_STARTS_AS_A_PRODUCT = ("nlora", "int_tune")
XS_STD = 1e-5
"""Standard deviation of LoRA-XS's core at the start (the paper's)."""


@dataclass
class CoreLoraConfig(AdditiveConfig):
    """Configuration of adapters s B N A.

    Raises:
        ValueError: A value is out of range.
    """

    variant: Variant = field(default="lora_xs", metadata={"help": "What the factors start from and what trains."})
    mixer: Literal["orthogonal", "kaiming"] = field(
        default="orthogonal", metadata={"help": "How the core of `moslora` starts."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("CORE_LORA")
        if self.variant not in Variant.__args__:  # type: ignore[attr-defined]
            raise ValueError(f"variant must be one of {', '.join(Variant.__args__)}, got {self.variant!r}")  # type: ignore[attr-defined]
        if self.mixer not in ("orthogonal", "kaiming"):
            raise ValueError(f"mixer must be orthogonal or kaiming, got {self.mixer!r}")


class CoreLoraLayer(CollectingLayer):
    """A linear layer with adapters s B N A."""

    adapter_layer_names = ("core_lora_N", "core_lora_A", "core_lora_B")
    other_param_names = ("rank", "scaling", "variant", "dropouts", "core_lora_N0", "core_lora_A0", "core_lora_B0")

    def make_containers(self) -> None:
        self.rank: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.variant: dict[str, str] = {}
        self.core_lora_N, self.core_lora_A, self.core_lora_B = (nn.ParameterDict() for _ in range(3))
        # What the product started as, where that was not zero.
        self.core_lora_N0, self.core_lora_A0, self.core_lora_B0 = (BufferDict(persistent=True) for _ in range(3))

    def make_adapter(self, adapter_name: str, config: CoreLoraConfig, **kwargs: Any) -> None:
        r = config.r
        if r > min(self.in_features, self.out_features):
            raise ValueError(
                f"r={r} is above the shorter side of a layer of {self.out_features} x {self.in_features}; use "
                f"{min(self.in_features, self.out_features)} or less"
            )
        self.rank[adapter_name], self.scaling[adapter_name] = r, config.alpha / r
        self.variant[adapter_name] = config.variant
        self.core_lora_N[adapter_name] = nn.Parameter(torch.empty(r, r))
        self.core_lora_A[adapter_name] = nn.Parameter(torch.empty(r, self.in_features))
        self.core_lora_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, r))
        self.is_asked = config.variant == "lora_sb"
        core_alone = config.variant in _TRAINS_CORE_ALONE
        if core_alone:
            self.frozen_peft_weight_names[adapter_name] = ("core_lora_A", "core_lora_B")
        base: Any = self.get_base_layer()
        with gather_params_ctx(base.weight):
            self._start(adapter_name, config)
        if config.variant in _STARTS_AS_A_PRODUCT:
            self.core_lora_N0[adapter_name] = self._start_kept(self.core_lora_N[adapter_name])
            if not core_alone:
                self.core_lora_A0[adapter_name] = self._start_kept(self.core_lora_A[adapter_name])
                self.core_lora_B0[adapter_name] = self._start_kept(self.core_lora_B[adapter_name])
            if not config.init_weights:
                with torch.no_grad():
                    self.core_lora_N[adapter_name].add_(torch.randn_like(self.core_lora_N[adapter_name]) * 0.1)

    def _start_kept(self, parameter: Tensor) -> Tensor:
        """Copy what a factor starts as. Where PEFT makes parameters without storage, a file will fill the copy too."""
        if parameter.is_meta:
            return torch.empty_like(parameter, device=self.get_base_weight().device)
        return parameter.detach().clone()

    @torch.no_grad()
    def _start(self, adapter_name: str, config: CoreLoraConfig) -> None:
        n, a, b = (getattr(self, key)[adapter_name] for key in self.adapter_layer_names)
        if config.variant == "moslora":
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.zeros_(b)
            nn.init.orthogonal_(n) if config.mixer == "orthogonal" else nn.init.kaiming_uniform_(n, a=math.sqrt(5))
            if not config.init_weights:
                nn.init.normal_(b, std=0.1)
            return
        if config.variant == "lora_sb":
            # An adapter of zeros, without any gradient, until `start_from_gradient`.
            for tensor in (n, a, b):
                nn.init.zeros_(tensor)
            if not config.init_weights:
                for tensor in (n, a, b):
                    nn.init.normal_(tensor, std=0.3)
            return
        weight = self.get_base_weight()
        if weight.is_meta or n.is_meta:
            return
        if config.variant == "lora_xs":
            b_start, _, a_start = largest_part(weight.float(), self.rank[adapter_name], singular_values_in="left")
            nn.init.normal_(n, std=XS_STD if config.init_weights else 1.0)
        else:
            a_start, corner, b_start = nystroem(weight.float(), self.rank[adapter_name])
            n.copy_(corner)
        a.copy_(a_start)
        b.copy_(b_start)

    def get_delta_weight(self, adapter: str) -> Tensor:
        n, a, b = (getattr(self, key)[adapter] for key in self.adapter_layer_names)
        low = n.device.type == "cpu" and n.dtype in (torch.float16, torch.bfloat16)
        b, n_, a = (t.float() if low else t for t in (b, n, a))
        if adapter not in self.core_lora_N0:
            product = b @ n_ @ a
        else:
            b0, n0, a0 = (t.to(a.dtype) for t in self._start_of(adapter))
            product = b0 @ ((n_ - n0) @ a + n0 @ (a - a0)) + (b - b0) @ n_ @ a
        return (self.scaling[adapter] * product).to(n.dtype)

    def added(self, adapter: str, tokens: Tensor) -> Tensor:
        n, a, b = (getattr(self, key)[adapter] for key in self.adapter_layer_names)
        if adapter not in self.core_lora_N0:
            return self.scaling[adapter] * F.linear(F.linear(F.linear(tokens, a), n), b)
        b0, n0, a0 = (t.to(n.dtype) for t in self._start_of(adapter))
        inner = F.linear(tokens, a)
        if adapter not in self.core_lora_A0:
            return self.scaling[adapter] * F.linear(F.linear(inner, n - n0), b)
        # B N A - B0 N0 A0 in what each factor moved: the two products are near each other, and may be large.
        moved = F.linear(inner, n - n0) + F.linear(F.linear(tokens, a - a0), n0)
        return self.scaling[adapter] * (F.linear(moved, b0) + F.linear(F.linear(inner, n), b - b0))

    def _start_of(self, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
        a0 = self.core_lora_A0[adapter] if adapter in self.core_lora_A0 else self.core_lora_A[adapter]
        b0 = self.core_lora_B0[adapter] if adapter in self.core_lora_B0 else self.core_lora_B[adapter]
        return b0, self.core_lora_N0[adapter], a0

    def parameters_in_order(self, adapter: str = "default") -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """N, A and B of an adapter."""
        n, a, b = (getattr(self, key)[adapter] for key in self.adapter_layer_names)
        return n, a, b

    def start_of_gradient(
        self, gradient: Tensor, step_size: float, adapter: str = "default"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return N, A, B of the best approximation of a first step of full fine-tuning, for `lora_sb`.

        The step is -step_size * sign(gradient), AdamW's first; B = U, A = V^T and N = S / s of its largest part.

        Args:
            gradient: [out, in], of the weight, summed over some tens of examples.
            step_size: The learning rate of the step.
            adapter: Which adapter.
        """
        left, values, right = largest_part(-step_size * gradient.float().sign(), self.rank[adapter])
        return (values / self.scaling[adapter]).diag(), right, left

    @torch.no_grad()
    def start_from_gradient(self, gradient: Tensor, step_size: float, adapter: str = "default") -> None:
        """Start a `lora_sb` adapter so; see `start_of_gradient`."""
        start = self.start_of_gradient(gradient, step_size, adapter)
        for parameter, value in zip(self.parameters_in_order(adapter), start, strict=True):
            parameter.copy_(value)

    def __repr__(self) -> str:
        return "core_lora." + super().__repr__()


class CoreLoraModel(AdditiveModel):
    """PEFT's tuner of adapters s B N A."""

    prefix: str = "core_lora_"
    tuner_layer_cls = CoreLoraLayer


def largest_part(
    matrix: Tensor, rank: int, *, singular_values_in: Literal["apart", "left"] = "apart"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [out, r], S [r] and V^T [r, in] of the `rank` largest singular values, or U S, S, V^T.

    Signs are such that the largest entry of each row of V^T is positive: LAPACKs differ in them.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    largest = right.gather(1, right.abs().argmax(1, keepdim=True)).sign().squeeze(1)
    left, right = left * largest, right * largest.unsqueeze(1)
    return (left * values if singular_values_in == "left" else left), values, right


def nystroem(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return A = W[:r], N = pinv(W[:r, :r]) and B = W[:, :r]: B N A is the Nystroem approximation of W [out, in]."""
    return matrix[:rank], torch.linalg.pinv(matrix[:rank, :rank]), matrix[:, :rank]


Config, Model = CoreLoraConfig, CoreLoraModel
