"""Output branches: what PEFT hangs beside a layer. The one place that knows PEFT's names for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from leanmill.core.facets import LowRank
from leanmill.core.stage import TechniqueModule


BASE = "base_layer"
"""Under this name a wrapped layer holds the layer it wraps."""


def is_branched(module: nn.Module) -> bool:
    """Whether `module` wraps a layer with branches."""
    return BASE in module._modules


def branched_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (path, layer) of every layer that wraps another with branches."""
    for path, module in model.named_modules():
        if is_branched(module):
            yield path, module


def branch_modules(layer: nn.Module) -> list[nn.Module]:
    """All modules below a branched layer but its base, and what techniques stood around some of them."""
    children = [child for key, child in layer._modules.items() if key != BASE and child is not None]
    below = [module for child in children for module in child.modules()]
    stood = {id(inner) for module in below if isinstance(module, TechniqueModule) for inner in module.modules()}
    return [module for module in below if id(module) not in stood]


def branch_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield (path, tensor, whether files hold it) of every parameter and buffer of adapters, shared ones once."""
    seen: set[int] = set()
    for path, layer in branched_layers(model):
        own = {id(layer)} | {id(module) for module in branch_modules(layer)}
        for below, module in layer.named_modules(prefix=path):
            if id(module) not in own or id(module) in seen:
                continue
            seen.add(id(module))
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    yield f"{below}.{key}", tensor, key not in module._non_persistent_buffers_set


def parameters_beside_buffers(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of adapters that compute with floating-point buffers, which nobody rounds for a forward."""
    for _, layer in branched_layers(model):
        own = [layer, *branch_modules(layer)]
        buffers = [buffer for module in own for buffer in module._buffers.values() if buffer is not None]
        if any(buffer.is_floating_point() for buffer in buffers):
            yield from (p for module in own for p in module._parameters.values() if p is not None)


def copy_untracked(source: nn.Module, target: nn.Module) -> None:
    """Copy what adapter layers keep in plain dicts of tensors (places drawn at random), which no state holds."""
    for key, value in vars(source).items():
        is_plain = isinstance(value, dict) and key not in ("_parameters", "_buffers")
        if is_plain and value and all(isinstance(one, Tensor) for one in value.values()):
            vars(target)[key] = dict(value)


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of the plain model's own modules, leaving out what techniques and adapters added."""
    added: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, TechniqueModule):
            added.update(id(m) for m in module.modules())
        elif is_branched(module):
            added.update(id(m) for m in branch_modules(module))
        if id(module) not in added:
            yield path, module


def reset_branch(layer: Any) -> None:
    """Fill a layer's branches as PEFT does by default."""
    for adapter in sorted(layer._get_available_adapters()):
        layer.reset_lora_parameters(adapter, True)


def has_factors(layer: Any) -> bool:
    """Whether a layer's branches are products of two factors and nothing else."""
    factors = [*getattr(layer, "lora_A", {}).values(), *getattr(layer, "lora_B", {}).values()]
    is_plain = not getattr(layer, "lora_variant", {}) and all(getattr(f, "bias", None) is None for f in factors)
    return bool(factors) and is_plain and all(isinstance(factor, nn.Linear) for factor in factors)


def factor_layers(layer: Any) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Return the linear layers A and B of a layer that `has_factors`, by adapter; others may be put in their places."""
    return layer.lora_A, layer.lora_B


def has_adapters(model: Any) -> bool:
    """Whether PEFT has wrapped `model`, or layers of it."""
    return hasattr(model, "peft_config") or any(is_branched(module) for module in model.modules())


def adapter_config(model: Any) -> Any:
    """Return the configuration that PEFT keeps on a wrapped model."""
    return model.peft_config["default"]


def low_rank_branches(layer: Any) -> Iterator[LowRank]:
    """Yield the factors of a layer's LoRA branches."""
    for adapter in layer.lora_A:
        a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
        yield LowRank(a=a, b=b, scaling=layer.scaling[adapter])


def stored_names(path: str, *, is_embedding: bool) -> tuple[str, str]:
    """Return what PEFT's files call the factors A and B of the layer at `path`; an embedding's are transposed."""
    a, b = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    return f"base_model.model.{path}.{a}", f"base_model.model.{path}.{b}"


def wrapped_parameter(model: nn.Module, name: str, wrapped: Collection[str]) -> str:
    """Return where PEFT's files have the adapter of a module's own parameter, such as stacked experts.

    PEFT wraps the module once for each of its `wrapped` parameters, in the order they are registered.
    """
    module_path, _, leaf = name.rpartition(".")
    own = [key for key in model.get_submodule(module_path)._parameters if f"{module_path}.{key}" in wrapped]
    return ".".join([module_path, *[BASE] * (len(own) - 1 - own.index(leaf))])


def bytes_watched(layer: Any) -> int:
    """Return the bytes that a rank holds in some steps to look at the gradient of the weight that a layer wraps."""
    watched: int = getattr(layer, "bytes_watched", 0)  # of adapters of our own alone
    return watched


def base_of(layer: Any) -> nn.Module:
    """Return the layer that a branched one wraps."""
    return layer.base_layer  # type: ignore[no-any-return]


def merged(layer: Any, base: nn.Module) -> nn.Module:
    """Add a layer's branches into `base`, in place, and return what computes the sum.

    Raises:
        NotImplementedError, ValueError: The adapter has no form in which it could be added.
    """
    layer.base_layer = base
    layer.merge(safe_merge=True)
    return base_of(layer)


def forget_branches(model: Any) -> None:
    """Remove what adapters left on the model itself."""
    if hasattr(model, "peft_config"):
        del model.peft_config
