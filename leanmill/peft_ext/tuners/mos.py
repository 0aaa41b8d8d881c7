"""MoS, mixture of shards, as a PEFT method: factors put together from shards of pools that all layers of a type share.

Of every type of layer (its own name and shape, such as `q_proj`), L layers share one pool of vectors for A and one for
B, each of `pool_rank` x L vectors, as many as LoRA of that rank has. Every vector is cut into `num_shards` shards. A
layer's factors have rank r, above `pool_rank`: row j of A [r, in] is `num_shards` shards of the pool side by side, at
places drawn once (Wang et al. 2024, arXiv:2410.00938). The paper's four means against the harm of sharing:

- subset selection: a layer sees some of the pool, drawn for it alone;
- pair dissociation: places in the pools of A and B are drawn apart;
- vector sharding: shards are drawn, not vectors;
- shard privatisation: `private_rank` of a layer's rows are shards that no other layer has.

Places are hashes of seed, type and layer, and are saved with the pools.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import PeftType
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.noise import derive_seed, uniform
from leanmill.peft_ext.tuners.additive import AdditiveConfig, AdditiveLayer, AdditiveModel


@dataclass
class MosConfig(AdditiveConfig):
    """Configuration of MoS adapters.

    Raises:
        ValueError: A value is out of range.
    """

    pool_rank: int = field(default=2, metadata={"help": "Trainable parameters are those of LoRA of this rank."})
    num_shards: int = field(default=4, metadata={"help": "Shards that a vector is cut into."})
    private_rank: int = field(default=1, metadata={"help": "Rows of a layer's factors that no other layer shares."})
    seed: int = field(default=0, metadata={"help": "Of the places in the pools."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("MOS")
        self.check_least(pool_rank=1, num_shards=1, private_rank=0)
        if self.private_rank > min(self.r, self.pool_rank):
            raise ValueError(
                f"private_rank={self.private_rank} is above r={self.r} or pool_rank={self.pool_rank}; use "
                f"{min(self.r, self.pool_rank)} or less"
            )
        if self.private_rank == self.pool_rank and self.r > self.pool_rank:
            raise ValueError(
                f"private_rank={self.private_rank} leaves nothing of pool_rank={self.pool_rank} to share; use a "
                f"smaller private_rank, or r={self.pool_rank}"
            )


class MosLayer(AdditiveLayer):
    """A linear layer with MoS adapters. The pools are its own submodules and those of its whole type."""

    adapter_layer_names = ("mos_pool_A", "mos_pool_B")
    other_param_names = ("rank", "scaling", "dropouts", "mos_table_A", "mos_table_B")

    def make_containers(self) -> None:
        self.rank: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.mos_pool_A, self.mos_pool_B = nn.ParameterDict(), nn.ParameterDict()
        self.mos_table_A, self.mos_table_B = BufferDict(persistent=True), BufferDict(persistent=True)

    def make_adapter(
        self,
        adapter_name: str,
        config: MosConfig,
        *,
        pools: tuple[nn.ParameterDict, nn.ParameterDict] | None = None,
        type_name: str = "",
        layer: int = 0,
        num_layers: int = 1,
        **kwargs: Any,
    ) -> None:
        assert pools is not None
        self.rank[adapter_name], self.scaling[adapter_name] = config.r, config.alpha / config.r
        self.mos_pool_A, self.mos_pool_B = pools
        for factor, tables in (("A", self.mos_table_A), ("B", self.mos_table_B)):
            key = derive_seed(config.seed, "mos", type_name, layer, factor)
            tables[adapter_name] = places(config, key, layer, num_layers)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A [r, in] and B^T [r, out] of an adapter."""
        a = F.embedding(self.mos_table_A[adapter], self.mos_pool_A[adapter]).flatten(1)
        b = F.embedding(self.mos_table_B[adapter], self.mos_pool_B[adapter]).flatten(1)
        return a, b

    def get_delta_weight(self, adapter: str) -> Tensor:
        a, b = self.factors(adapter)
        if a.device.type == "cpu" and a.dtype in (torch.float16, torch.bfloat16):
            return (self.scaling[adapter] * (b.float().t() @ a.float())).to(a.dtype)
        return self.scaling[adapter] * (b.t() @ a)

    def added(self, adapter: str, tokens: Tensor) -> Tensor:
        a, b = self.factors(adapter)
        return self.scaling[adapter] * (F.linear(tokens, a) @ b)

    def __repr__(self) -> str:
        return "mos." + super().__repr__()


class MosModel(AdditiveModel):
    """PEFT's tuner of MoS adapters; holds the pools, by type of layer."""

    prefix: str = "mos_"
    tuner_layer_cls = MosLayer
    uses_shared_state = True

    def layer_arguments(self, config: MosConfig, adapter_name: str, target: Any, key: str) -> dict[str, Any]:
        found = self._types(config, adapter_name)
        base: Any = target.get_base_layer() if isinstance(target, MosLayer) else target
        type_name = _type_of(key, base)
        members = found[type_name]
        pools = tuple(self._pool(factor, type_name) for factor in "AB")
        if adapter_name not in pools[0]:
            for pool, size, factor in zip(pools, (base.in_features, base.out_features), "AB", strict=True):
                pool[adapter_name] = _new_pool(config, len(members), size, factor, key)
        return {"pools": pools, "type_name": type_name, "layer": members.index(key), "num_layers": len(members)}

    def _types(self, config: MosConfig, adapter_name: str) -> dict[str, list[str]]:
        """Names of the wrapped layers, by type."""
        known: dict[str, dict[str, list[str]]] = self.__dict__.setdefault("_mos_types", {})
        if adapter_name not in known:
            known[adapter_name] = {}
            wanted: Any = _maybe_include_all_linear_layers(config, self.model)
            inside = [name for name, module in self.model.named_modules() if isinstance(module, MosLayer)]
            for name, module in self.model.named_modules():
                if any(name.startswith(f"{outer}.") for outer in inside):
                    continue
                base = module.get_base_layer() if isinstance(module, MosLayer) else module
                if hasattr(base, "in_features") and self._check_target_module_exists(wanted, name):
                    known[adapter_name].setdefault(_type_of(name, base), []).append(name)
        return known[adapter_name]

    def _pool(self, factor: str, type_name: str) -> nn.ParameterDict:
        attribute = f"mos_pool_{factor}_{type_name}"
        if not hasattr(self, attribute):
            setattr(self, attribute, nn.ParameterDict())
        pool: nn.ParameterDict = getattr(self, attribute)
        return pool

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Any, unwanted_adapter_names: Any
    ) -> dict[str, Tensor]:
        own: dict[str, Tensor] = super()._get_adapter_state_dict(
            model=model,
            config=config,
            adapter_name=adapter_name,
            state_dict=state_dict,
            unwanted_adapter_names=unwanted_adapter_names,
        )
        # Each layer shows the pools as its own: they are saved once, as the tuner's.
        kept = {name: value for name, value in own.items() if ".mos_pool_" not in name}
        pools = {
            name: value
            for name, value in state_dict.items()
            if name.startswith("base_model.mos_pool_") and name.endswith(f".{adapter_name}")
        }
        return {**kept, **pools}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        own: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for path, layer in model.named_modules():
            if isinstance(layer, MosLayer):
                of_type = _type_of(path, layer)
                for factor in "AB":
                    pool = own.get(f"base_model.mos_pool_{factor}_{of_type}.{adapter_name}")
                    if pool is not None:
                        own[f"{path}.mos_pool_{factor}.{adapter_name}"] = pool
        return own


def places(config: MosConfig, key: int, layer: int, num_layers: int) -> Tensor:
    """Return which shards of a pool a layer's rows are made of: [r, num_shards] int64.

    A pool begins with what layers own alone, `private_rank` x `num_shards` shards each. The rest is public: of it a
    layer takes a random subset, and begins another round where it needs more than there are.
    """
    own = config.private_rank * config.num_shards
    private = torch.arange(layer * own, (layer + 1) * own)
    first, last = num_layers * own, num_layers * config.pool_rank * config.num_shards
    needed, public = (config.r - config.private_rank) * config.num_shards, last - first
    drawn: list[Tensor] = []
    while needed > 0:
        numbers = uniform(torch.tensor([key]), torch.arange(len(drawn) * public, (len(drawn) + 1) * public))
        drawn.append(first + numbers.argsort(stable=True)[:needed])
        needed -= public
    return torch.cat([private, *drawn]).view(config.r, config.num_shards)


def _new_pool(config: MosConfig, num_layers: int, size: int, factor: str, name: str) -> nn.Parameter:
    if size % config.num_shards:
        raise ValueError(f"num_shards={config.num_shards} does not divide a side of {name}, {size}")
    pool = torch.zeros(num_layers * config.pool_rank * config.num_shards, size // config.num_shards)
    if factor == "A" or not config.init_weights:
        nn.init.uniform_(pool, -(size**-0.5), size**-0.5)  # Kaiming-uniform as LoRA's, over a whole vector
    return nn.Parameter(pool)


def _type_of(name: str, layer: Any) -> str:
    return f"{name.rpartition('.')[2]}_{layer.out_features}x{layer.in_features}"


Config, Model = MosConfig, MosModel
