"""What tuners share whose layers compute W x + D x with a matrix D that is known: merging, several adapters, bases.

A tuner says which matrix, how it multiplies, and what it starts from.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn


@dataclass
class AdditiveConfig(PeftConfig):
    """What configurations of such tuners share; one names its `peft_type` itself.

    Raises:
        ValueError: A value is out of range.
    """

    r: int = field(default=16, metadata={"help": "Rank of each layer's factors, or size of the core between them."})
    alpha: float = field(default=16.0, metadata={"help": "Numerator of the scaling alpha / r."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input."})
    init_weights: bool = field(
        default=True, metadata={"help": "False starts from random values that are no identity, for tests."}
    )
    target_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to wrap."})
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers to wrap."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules that train whole."})
    bias: str = field(
        default="none",
        metadata={"help": "Biases of the base that train: 'none', 'all', or '<method>_only' for wrapped layers."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("target_modules", "exclude_modules"):
            value = getattr(self, key)
            setattr(self, key, set(value) if isinstance(value, list) else value)
        self.check_least(r=1)
        if self.bias not in ("none", "all") and not self.bias.endswith("_only"):
            raise ValueError(f"bias must be 'none', 'all' or '<method>_only', got {self.bias!r}")

    def check_least(self, **least: int) -> None:
        """Refuse values of these names that are no integers of at least so much."""
        for key, smallest in least.items():
            value = getattr(self, key)
            if not isinstance(value, int) or value < smallest:
                raise ValueError(f"{key} must be an integer of at least {smallest}, got {value!r}")


class AdditiveLayer(nn.Module, BaseTunerLayer):
    """A linear layer with adapters that each add a matrix, by the adapter's name.

    Args:
        base_layer: What it wraps: `nn.Linear`, or a quantised layer that PEFT knows.
        adapter_name: Of the first adapter.
        config: Its configuration.
        **kwargs: What PEFT hands on for quantised layers, and what `update_layer` takes.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        base: Any = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(
            base, get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.in_features, self.out_features = base.in_features, base.out_features
        self.dropouts = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.cast_input_dtype_enabled = True
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.make_containers()
        self.update_layer(adapter_name, config, **kwargs)

    @abstractmethod
    def make_containers(self) -> None:
        """Make the empty dicts, by adapter, that `adapter_layer_names` and `other_param_names` name."""

    @abstractmethod
    def make_adapter(self, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Fill the containers for a new adapter, with its start values unless the weight is on the meta device."""

    @abstractmethod
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the matrix [out, in] that the adapter adds, in the dtype of its parameters."""

    @abstractmethod
    def added(self, adapter: str, tokens: Tensor) -> Tensor:
        """Return what the adapter adds for `tokens` [..., in]: [..., out]."""

    def holds(self, adapter: str) -> bool:
        """Whether there is an adapter of this name here."""
        return adapter in getattr(self, self.adapter_layer_names[0])

    def update_layer(self, adapter_name: str, config: Any, inference_mode: bool = False, **kwargs: Any) -> None:
        """Add an adapter."""
        self.dropouts[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.make_adapter(adapter_name, config, **kwargs)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters into the base's weight.

        Raises:
            ValueError: With `safe_merge`, a sum is not finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if not self.holds(adapter):
                continue
            weight = self.get_base_weight()
            merged = weight + self.get_delta_weight(adapter).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            self.set_base_weight(merged)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take merged adapters out of the base's weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if self.holds(adapter):
                weight = self.get_base_weight()
                self.set_base_weight(weight - self.get_delta_weight(adapter).to(weight.dtype))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whatever is added is a matrix."""
        return True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base and the active adapters to `x` [..., in]."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for adapter in self.active_adapters:
            if self.holds(adapter):
                tokens = self._cast_input_dtype(x, self.dtype_of(adapter))
                result = result + self.added(adapter, self.dropouts[adapter](tokens))
        return result.to(dtype)

    def dtype_of(self, adapter: str) -> torch.dtype:
        """The dtype that an adapter computes in."""
        dtype: torch.dtype = getattr(self, self.adapter_layer_names[0])[adapter].dtype
        return dtype


class UnmergeableLayer(AdditiveLayer):
    """Such a layer whose adapters depend on the token, so that no matrix adds the same."""

    why_no_matrix: ClassVar[str]
    """For messages."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        raise NotImplementedError(self.why_no_matrix)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse."""
        raise NotImplementedError(self.why_no_matrix)

    def unmerge(self) -> None:
        """Refuse."""
        raise NotImplementedError(self.why_no_matrix)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Never."""
        return False


class AdditiveModel(BaseTuner):
    """A tuner whose layers are `AdditiveLayer`s."""

    target_module_mapping: dict[str, list[str]] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def layer_arguments(self, config: Any, adapter_name: str, target: nn.Module, key: str) -> dict[str, Any]:
        """Return what a layer's `make_adapter` takes beside the configuration."""
        return {}

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        kwargs = get_quantization_kwargs(self) | self.layer_arguments(peft_config, adapter_name, target, current_key)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, **kwargs)  # type: ignore[attr-defined]
            return
        backend = resolve_quantization_backend(target)
        if not isinstance(target, nn.Linear) and getattr(backend, "layer_type", None) != "linear":
            raise TypeError(f"Target module {target} is not supported: {type(self).__name__} wraps linear layers only.")
        layer = self.tuner_layer_cls(target, adapter_name, peft_config, **kwargs)  # type: ignore[call-arg]
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # type: ignore[attr-defined]
        self._replace_module(parent, target_name, layer, target)
