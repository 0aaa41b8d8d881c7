"""Series and parallel adapters as one PEFT method: two thin layers with a non-linearity between.

f(z) = s U act(D z), D [r, size of z] and U [size of the sum, r], s = alpha / r, stands (Hu et al. 2023, LLM-Adapters,
arXiv:2304.01933, after Houlsby et al. 2019 and He et al. 2022):

- `series`: behind the layer, y + f(y) with y = W x; before it, W (x + f(x)), at layers that `before` names;
- `parallel`: beside it, W x + f(x).

U starts at zero, so that the model starts as the base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft.utils import PeftType
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.peft_ext.tuners.additive import AdditiveConfig, AdditiveModel, UnmergeableLayer


_ACTIVATION = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, _ACTIVATION] = {"tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
_WHERE = ("series", "parallel")
BEFORE = ["gate_proj", "up_proj", "fc1", "c_fc", "fc_in", "dense_h_to_4h"]
"""First layers of an MLP, by the names that families give them."""


@dataclass
class BottleneckConfig(AdditiveConfig):
    """Configuration of bottleneck adapters; `r` is the size of the bottleneck.

    Raises:
        ValueError: A value is out of range.
    """

    placement: Literal["series", "parallel"] = field(
        default="series", metadata={"help": "Behind (or before) the layer, or beside it."}
    )
    before: list[str] = field(
        default_factory=lambda: list(BEFORE),
        metadata={"help": "Names of layers that a series adapter stands before: the first ones of an MLP."},
    )
    activation: Literal["tanh", "relu", "gelu", "silu"] = field(
        default="tanh", metadata={"help": "The non-linearity in the bottleneck."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("BOTTLENECK")
        for key, allowed in (("placement", _WHERE), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {getattr(self, key)!r}")
        if not isinstance(self.before, list) or not all(isinstance(name, str) for name in self.before):
            raise ValueError(f"before must be a list of names of layers, got {self.before!r}")
        if self.placement == "parallel" and self.before != BEFORE:
            raise ValueError(
                f"before={self.before} is read with placement='series' alone: beside a layer there is no before; leave "
                f"it out, or set placement='series'"
            )


class BottleneckLayer(UnmergeableLayer):
    """A linear layer with bottleneck adapters."""

    why_no_matrix = "a bottleneck with a non-linearity is no matrix"
    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("rank", "scaling", "side", "activation", "dropouts")

    def make_containers(self) -> None:
        self.rank: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.side: dict[str, str] = {}
        """`before`, `behind` or `beside` the layer, by adapter."""
        self.activation: dict[str, str] = {}
        self.bottleneck_down, self.bottleneck_up = nn.ParameterDict(), nn.ParameterDict()

    def make_adapter(self, adapter_name: str, config: BottleneckConfig, *, name: str = "", **kwargs: Any) -> None:
        side = "beside" if config.placement == "parallel" else "before" if name in config.before else "behind"
        self.rank[adapter_name], self.scaling[adapter_name] = config.r, config.alpha / config.r
        self.side[adapter_name], self.activation[adapter_name] = side, config.activation
        num_in = self.out_features if side == "behind" else self.in_features
        num_out = self.in_features if side == "before" else self.out_features
        down, up = torch.empty(config.r, num_in), torch.zeros(num_out, config.r)
        nn.init.uniform_(down, -(num_in**-0.5), num_in**-0.5)  # Kaiming-uniform with a = sqrt(5)
        if not config.init_weights:
            nn.init.normal_(up, std=0.1)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = nn.Parameter(down), nn.Parameter(up)

    def added(self, adapter: str, tokens: Tensor) -> Tensor:
        inner = ACTIVATIONS[self.activation[adapter]](F.linear(tokens, self.bottleneck_down[adapter]))
        return self.scaling[adapter] * F.linear(inner, self.bottleneck_up[adapter])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base and the active adapters to `x` [..., in]."""
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        result: Tensor = self.base_layer(self._with(x, x, "before"), *args, **kwargs)
        dtype = result.dtype
        result = self._with(result, x, "beside")
        return self._with(result, result, "behind").to(dtype)

    def _with(self, sum_: Tensor, tokens: Tensor, side: str) -> Tensor:
        """Add to `sum_` what active adapters on one side of the layer make of `tokens`."""
        for adapter in self.active_adapters:
            if self.holds(adapter) and self.side[adapter] == side:
                own = self._cast_input_dtype(tokens, self.dtype_of(adapter))
                sum_ = sum_ + self.added(adapter, self.dropouts[adapter](own))
        return sum_.to(tokens.dtype) if side == "before" else sum_

    def __repr__(self) -> str:
        return "bottleneck." + super().__repr__()


class BottleneckModel(AdditiveModel):
    """PEFT's tuner of bottleneck adapters."""

    prefix: str = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def layer_arguments(self, config: Any, adapter_name: str, target: nn.Module, key: str) -> dict[str, Any]:
        return {"name": key.rpartition(".")[2]}


Config, Model = BottleneckConfig, BottleneckModel
