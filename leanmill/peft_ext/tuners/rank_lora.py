"""LoRA with more ranks than it uses, as one PEFT method: IncreLoRA (layers earn ranks) and DyLoRA (ranks are nested).

    dW = B diag(f) A,   f_j = alpha / n x E_j for the n ranks that are used, 0 for the others

with A [r, in] and B [out, r]. No shape changes while it trains: which ranks are used is a buffer.

- `increlora` (Zhang et al. 2023, arXiv:2308.12043): E [r] trains, n begins with `init_r` and grows. Behind the used
  ranks some are in reserve: their A and B train already, under an E of 1e-5 that does not.
- `dylora` (Valipour et al. 2022, arXiv:2210.07558): E = 1; in every step the first n ranks are used, n drawn anew, so
  that the first n are an adapter for every n.

Who trains moves the ranks (`leanmill.peft_ext.peft.ranks`); PEFT alone trains those there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.utils import PeftType
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.peft_ext.tuners.additive import AdditiveConfig, AdditiveModel
from leanmill.peft_ext.tuners.collecting import CollectingLayer


RESERVED = 1e-5
"""E of a rank in reserve, and of one that begins to be used."""
_STD = 0.02
"""Standard deviation of IncreLoRA's A and B at the start."""
_OF = {
    "increlora": (
        "init_r", "target_r", "grow_r", "grow_layers", "grow_every", "grow_after", "score", "sensitivity_decay",
        "uncertainty_decay", "orthogonality",
    ),
    "dylora": ("least_r", "used_r", "frozen"),
}  # fmt: skip
"""Options that one of the variants has."""


@dataclass
class RankLoraConfig(AdditiveConfig):
    """Configuration of LoRA of up to `r` ranks a layer, scaled by alpha / the ranks that are used.

    Raises:
        ValueError: A value is out of range, or belongs to the other variant.
    """

    variant: Literal["increlora", "dylora"] = field(
        default="increlora", metadata={"help": "Layers that earn ranks, or nested ranks."}
    )
    init_r: int = field(default=1, metadata={"help": "Ranks of every layer at the start."})
    target_r: float = field(default=8.0, metadata={"help": "Ranks of a layer in the end, as a mean over layers."})
    grow_r: int = field(default=1, metadata={"help": "Ranks that a layer is given at a time, and holds in reserve."})
    grow_layers: int = field(default=4, metadata={"help": "Layers that are given ranks at a time."})
    grow_every: int = field(default=100, metadata={"help": "Optimizer steps from one growth to the next."})
    grow_after: int = field(default=100, metadata={"help": "Optimizer steps before the first growth."})
    score: Literal["product", "factors"] = field(
        default="product",
        metadata={"help": "What importance is read off: the gradient of dW (the paper's), or those of its factors."},
    )
    sensitivity_decay: float = field(default=0.85, metadata={"help": "What a layer's past sensitivity counts for."})
    uncertainty_decay: float = field(default=0.85, metadata={"help": "What its past uncertainty counts for."})
    orthogonality: float = field(default=0.1, metadata={"help": "Weight of the penalty on A A^T - I and B^T B - I."})
    least_r: int = field(default=1, metadata={"help": "Least rank that is drawn."})
    used_r: int | None = field(
        default=None, metadata={"help": "Ranks that are used where none are drawn; None uses all."}
    )
    frozen: bool = field(default=False, metadata={"help": "In every step train the last of the drawn ranks alone."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("RANK_LORA")
        if self.variant not in _OF:
            raise ValueError(f"variant must be one of {', '.join(_OF)}, got {self.variant!r}")
        self._check_options_of_the_other()
        self.check_least(init_r=1, grow_r=1, grow_layers=1, grow_every=1, grow_after=0, least_r=1)
        if self.score not in ("product", "factors"):
            raise ValueError(f"score must be product or factors, got {self.score!r}")
        for key in ("sensitivity_decay", "uncertainty_decay"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} must be in [0, 1), got {getattr(self, key)!r}")
        if not 0 <= self.orthogonality < float("inf"):
            raise ValueError(f"orthogonality must be finite and not negative, got {self.orthogonality!r}")
        if self.variant == "dylora":
            self._check_within("least_r", 1)
            if self.used_r is not None:
                self.check_least(used_r=1)
                self._check_within("used_r", 1)
        else:
            self._check_within("init_r", 1)
            self._check_within("target_r", self.init_r)

    def _check_options_of_the_other(self) -> None:
        for variant, keys in _OF.items():
            for key in keys if variant != self.variant else ():
                if getattr(self, key) != type(self).__dataclass_fields__[key].default:
                    raise ValueError(f"{key} belongs to variant={variant}, and variant={self.variant}; leave it out")

    def _check_within(self, key: str, least: int) -> None:
        value = getattr(self, key)
        if not least <= value <= self.r:
            raise ValueError(f"{key}={value} must be from {least} to r={self.r}")


class RankLoraLayer(CollectingLayer):
    """A linear layer with adapters of which some ranks are used."""

    adapter_layer_names = ("rank_lora_A", "rank_lora_B", "rank_lora_E")
    other_param_names = ("rank", "alpha", "dropouts", "rank_lora_count", "rank_lora_drawn", "trains_last_alone")

    def make_containers(self) -> None:
        self.rank: dict[str, int] = {}
        """The most there are."""
        self.alpha: dict[str, float] = {}
        self.trains_last_alone: dict[str, bool] = {}
        self.rank_lora_A, self.rank_lora_B, self.rank_lora_E = (nn.ParameterDict() for _ in range(3))
        self.rank_lora_count = BufferDict(persistent=True)
        """int64 [2]: ranks that are used and ranks in reserve, of `increlora`."""
        self.rank_lora_drawn = BufferDict(persistent=False)
        """int64 [1]: ranks that are used, of `dylora`. No file has it: it is what the configuration says."""

    def make_adapter(self, adapter_name: str, config: RankLoraConfig, **kwargs: Any) -> None:
        r = config.r
        self.rank[adapter_name], self.alpha[adapter_name] = r, config.alpha
        self.trains_last_alone[adapter_name] = config.frozen
        self.is_asked = config.variant == "increlora" and config.score == "product"
        a, b = torch.empty(r, self.in_features), torch.zeros(self.out_features, r)
        if config.variant == "dylora":
            self.rank_lora_drawn[adapter_name] = torch.tensor([config.used_r or r])
            nn.init.uniform_(a, -(self.in_features**-0.5), self.in_features**-0.5)  # Kaiming-uniform, a = sqrt(5)
            if not config.init_weights:
                nn.init.normal_(b, std=0.1)
        else:
            self.rank_lora_count[adapter_name] = torch.tensor([config.init_r, min(config.grow_r, r - config.init_r)])
            e = torch.full((r,), RESERVED)
            e[: config.init_r] = 0.0
            for factor in (a, b):
                nn.init.normal_(factor, std=_STD if config.init_weights else 0.3)
            if not config.init_weights:
                nn.init.normal_(e)
            self.rank_lora_E[adapter_name] = nn.Parameter(e)
        self.rank_lora_A[adapter_name], self.rank_lora_B[adapter_name] = nn.Parameter(a), nn.Parameter(b)

    def weights(self, adapter: str, e: Tensor | None) -> Tensor:
        """Return what stands between A and B for each rank, fp32 [r], given E [r], where there is one."""
        if e is None:
            used = self.rank_lora_drawn[adapter]
            index = torch.arange(self.rank[adapter], device=used.device)
            found = (index < used).float()
        else:
            used, reserved = self.rank_lora_count[adapter].to(e.device).unbind()
            index = torch.arange(self.rank[adapter], device=e.device)
            found = torch.where(index < used + reserved, RESERVED, 0.0)
            found = torch.where(index < used, e.float(), found)
        return found * (self.alpha[adapter] / used)

    def product(self, a: Tensor, b: Tensor, e: Tensor | None, adapter: str) -> Tensor:
        """Return dW [out, in], fp32, of whole factors."""
        return (b.float() * self.weights(adapter, e)) @ a.float()

    def get_delta_weight(self, adapter: str) -> Tensor:
        a, b = self.rank_lora_A[adapter], self.rank_lora_B[adapter]
        return self.product(a, b, self._e(adapter), adapter).to(a.dtype)

    def _e(self, adapter: str) -> Tensor | None:
        return self.rank_lora_E.get(adapter)

    def added(self, adapter: str, tokens: Tensor) -> Tensor:
        a, b = self.rank_lora_A[adapter], self.rank_lora_B[adapter]
        weights = self.weights(adapter, self._e(adapter))
        if self.trains_last_alone[adapter]:
            is_last = torch.arange(len(weights), device=weights.device) == self.rank_lora_drawn[adapter] - 1
            a, b = torch.where(is_last.unsqueeze(1), a, a.detach()), torch.where(is_last, b, b.detach())
        inner = F.linear(tokens, a)
        return F.linear(inner * weights.to(inner.dtype), b)

    def use_rank(self, rank: int, adapter: str = "default") -> None:
        """Use the first `rank` ranks of a `dylora` adapter from now on.

        Raises:
            ValueError: It has not so many, or is of the other variant.
        """
        if adapter not in self.rank_lora_drawn:
            raise ValueError(f"adapter {adapter!r} is no dylora: its layers have the ranks that they were given")
        if not 1 <= rank <= self.rank[adapter]:
            raise ValueError(f"rank={rank} must be from 1 to r={self.rank[adapter]}")
        self.rank_lora_drawn[adapter].fill_(rank)

    def __repr__(self) -> str:
        return "rank_lora." + super().__repr__()


class RankLoraModel(AdditiveModel):
    """PEFT's tuner of LoRA with more ranks than it uses."""

    prefix: str = "rank_lora_"
    tuner_layer_cls = RankLoraLayer

    def use_rank(self, rank: int, adapter: str = "default") -> None:
        """Use the first `rank` ranks of a `dylora` adapter in every layer, in what is saved too.

        Raises:
            ValueError: See `RankLoraLayer.use_rank`.
        """
        for module in self.modules():
            if isinstance(module, RankLoraLayer):
                module.use_rank(rank, adapter)
        config: Any = self.peft_config[adapter]
        config.used_r = rank


Config, Model = RankLoraConfig, RankLoraModel
