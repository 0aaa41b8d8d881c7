"""How FSDP2 shards what is left of an expert's weight on the ranks that hold the same experts."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor, Shard

from leanmill.core.errors import ConfigError
from leanmill.core.staging import StagedOnce
from leanmill.parallel.layout import Layout


class ExpertSharding:
    """Names mesh and dim for each parameter that `fully_shard` meets.

    Whole experts go to each rank where there are enough; else every rank gets a part of each expert, cut
    along another dim, so that none is left empty.

    Args:
        layout: With an `ep` above 1.
    """

    def __init__(self, layout: Layout) -> None:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo

        # It calls gathering over two dims of a mesh slow, whoever asks for a whole weight, and says so on every rank.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        mesh = layout.experts
        self.has_replicas = layout.expert_replicate > 1
        self._num_shards = layout.expert_shard
        self._info: Any = (
            HSDPMeshInfo(mesh["replicate", "shard"], shard_mesh_dim=1, replicate_mesh_dim=0)
            if self.has_replicas
            else FSDPMeshInfo(mesh["shard"], shard_mesh_dim=0)
        )

    def placement(self, parameter: nn.Parameter) -> Any:
        """Return FSDP2's `ShardPlacementResult`; None for a dense parameter, which goes over the module's own mesh.

        Raises:
            ConfigError: No dim of the parameter divides by the ranks that are to share it.
        """
        if not isinstance(parameter, DTensor):
            return None
        from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult

        return ShardPlacementResult(Shard(self._dim(parameter)), self._info)

    def reason_against(self, weight: StagedOnce) -> str | None:
        """Return why a weight cannot be staged once a step on this rank's part of it; None where it can."""
        raw = weight.raw
        if not isinstance(raw, DTensor):
            return None
        if self._dim(raw) != 0:
            return "ranks share each of its experts"
        alone = all(stage.stages_rows_alone(raw.to_local(), weight.shape) for stage in weight.stages)
        return None if alone else "its experts depend on those of other ranks"

    def _dim(self, parameter: DTensor) -> int:
        shape = parameter.to_local().shape
        for dim, size in enumerate(shape):
            if size % self._num_shards == 0:
                return dim
        raise ConfigError(
            f"an expert parameter {list(shape)} has no dim that divides by the {self._num_shards} ranks that hold "
            f"these experts; set layout.ep higher, or layout.dp_shard lower"
        )
