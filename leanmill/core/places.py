"""Places: the modules of a causal LM that techniques may stand around, found by what they are.

No class of any model family is named here. Attention and routers are what transformers itself records
for the family (`_can_record_outputs`); the rest shows in a module's parameters and in what it takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from leanmill.core.around import Around, put_around
from leanmill.core.blocks import decoder_blocks
from leanmill.core.branches import plain_modules
from leanmill.core.stage import AROUND


Kind = Literal["block", "attention", "router", "norm", "mlp"]
_Test = Callable[[str, nn.Module], bool]
_EPSILONS = ("eps", "epsilon", "variance_epsilon", "normalized_shape")
_OF_MIXERS = {"attention_mask", "past_key_values", "layer_past", "cache_params", "position_ids", "position_embeddings"}
"""What the forward of a module that mixes tokens takes beside hidden states, one or the other."""


@dataclass(frozen=True)
class Place:
    """A module that techniques may stand around."""

    name: str
    """Dotted, as in the plain model, e.g. `model.layers.0.self_attn`."""
    layer: int | None
    """Index of the decoder block that it is or lies in; None outside of them."""
    module: nn.Module

    def around(self, around: Around) -> None:
        """Let `around` wrap every call of the module, whose parameters and buffers keep their names."""
        put_around(self.module, around)


def find_modules(model: nn.Module, kind: Kind) -> Iterator[tuple[str, int | None, nn.Module]]:
    """Yield (path, layer, module) of every module of a kind, in the order they are registered.

    - `block`: a decoder layer.
    - `attention`: attention over tokens, as transformers names it for the family; other mixers are not.
    - `router`: what scores experts, one a layer that has any.
    - `norm`: layer and RMS norms: of the residual stream, of queries and keys, before the head.
    - `mlp`: what else of a block holds matmuls and sees one token at a time, dense or a mixture of experts.
    """
    blocks = decoder_blocks(model)
    layer_of = {id(inner): index for index, block in enumerate(blocks) for inner in block.modules()}
    is_kind = _tests(model, blocks)[kind]
    for path, module in plain_modules(model):
        if is_kind(path, module):
            yield path, layer_of.get(id(module)), module


def _tests(model: nn.Module, blocks: list[nn.Module]) -> dict[Kind, _Test]:
    block_ids = {id(block) for block in blocks}
    child_ids = {id(child) for block in blocks for name, child in block.named_children() if name != AROUND}
    is_attention, is_router = _recorded(model, "attentions"), _recorded(model, "router_logits")

    def is_mlp(path: str, module: nn.Module) -> bool:
        if id(module) not in child_ids or not holds_matmul(module) or _OF_MIXERS & _arguments(module):
            return False
        return not any(is_attention(f"{path}.{inner}".rstrip("."), m) for inner, m in module.named_modules())

    return {
        "block": lambda path, module: id(module) in block_ids,
        "attention": is_attention,
        # Attention of experts has a router too, and is recorded as one.
        "router": lambda path, module: is_router(path, module) and not is_attention(path, module),
        "norm": lambda path, module: is_norm(module),
        "mlp": is_mlp,
    }


def _recorded(model: nn.Module, key: str) -> _Test:
    """Whether transformers records a module's output under `key`: it lists classes, and parts of names."""
    wanted: list[tuple[Any, str]] = []
    for owner in model.modules():
        specs = (getattr(owner, "_can_record_outputs", None) or {}).get(key, ())
        for spec in specs if isinstance(specs, (list, tuple)) else [specs]:
            recorded = getattr(spec, "target_class", spec)
            if isinstance(recorded, type):
                wanted.append((recorded, getattr(spec, "layer_name", None) or ""))
    return lambda path, module: any(isinstance(module, kind) and part in f".{path}" for kind, part in wanted)


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a layer or RMS norm: an epsilon and at most a vector of weights and one of biases."""
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    return (
        any(hasattr(module, name) for name in _EPSILONS)
        and module._modules.keys() <= {AROUND}
        and own.keys() <= {"weight", "bias"}
        and all(p.dim() == 1 for p in own.values())
    )


def holds_matmul(module: nn.Module) -> bool:
    """Whether `module` has a weight of at least 2 dims, beside what stands around it."""
    return any(p.dim() > 1 and AROUND not in path.split(".") for path, p in module.named_parameters())


def _arguments(module: nn.Module) -> set[str]:
    return set(inspect.signature(type(module).forward).parameters)
