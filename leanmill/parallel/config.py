"""How a run is spread over processes. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from leanmill.core.config import Config
from leanmill.core.errors import ConfigError
from leanmill.core.near import near_divisors
from leanmill.parallel.low_comm_config import OuterConfig
from leanmill.parallel.pipeline_plan import Schedule


class TorchEngineConfig(Config):
    """What the engines on torch alone share."""

    staging: Literal["auto", "per_step", "per_use"] = "auto"
    """When masks, quantisers and rotations of weights run. `per_step`: once an optimizer step, on each rank's own
    shard under FSDP2, and backward through them once. `per_use`: in every forward and again in backward, which
    keeps no copy. `auto`: once a step wherever a technique allows it and the copies take little memory."""


class AutoEngine(TorchEngineConfig):
    """Let Leanmill pick the engine; the log says which and why."""

    type: Literal["auto"] = "auto"


class SingleEngine(TorchEngineConfig):
    """One process, no sharding."""

    type: Literal["single"] = "single"


class DdpEngine(TorchEngineConfig):
    """Replicate the model on every rank; all-reduce gradients (torch DDP)."""

    type: Literal["ddp"] = "ddp"


class FsdpEngine(TorchEngineConfig):
    """Shard parameters, gradients and optimizer state with torch FSDP2."""

    type: Literal["fsdp"] = "fsdp"
    shard_size: int | None = Field(default=None, ge=1)
    """Ranks a parameter is sharded over; fewer than the world size gives HSDP (a 2-D mesh of
    replicas x shards). None shards over all ranks."""
    reshard_after_forward: bool = True
    """Free gathered weights between forward and backward (ZeRO-3 like); false keeps them."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the gradient reduction."""
    gather: Literal["full", "packed"] = "full"
    """How weights that are staged once a step travel: as they are multiplied with, or `packed`: ternary ones as 2
    bits a weight, N:M ones as kept values and indices. Fewer bytes, the same losses."""

    @model_validator(mode="after")
    def _packs_what_is_staged(self) -> FsdpEngine:
        if self.gather == "packed" and self.staging == "per_use":
            raise ConfigError(
                "engine.gather=packed sends weights that are staged before they are gathered, which "
                "engine.staging=per_use rules out; set engine.staging=per_step, or engine.gather=full"
            )
        return self


class DeepSpeedOffload(Config):
    """Where ZeRO keeps a part of the state."""

    device: Literal["cpu", "nvme"]
    """`nvme` needs libaio and `path`."""
    path: str | None = None
    """Directory on the NVMe device."""

    @model_validator(mode="after")
    def _check(self) -> DeepSpeedOffload:
        if self.device == "nvme" and not self.path:
            raise ConfigError("device nvme needs a directory; add path: /path/on/the/nvme/device, or use device: cpu")
        if self.device == "cpu" and self.path is not None:
            raise ConfigError(f"path={self.path!r} is only for device nvme; remove it, or use device: nvme")
        return self


class DeepSpeedEngine(Config):
    """DeepSpeed ZeRO; `deepspeed.initialize` is called by Leanmill with a config it derives."""

    type: Literal["deepspeed"] = "deepspeed"
    stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: 0 none, 1 optimizer state, 2 + gradients, 3 + parameters."""
    offload_optimizer: DeepSpeedOffload | None = None
    """Offload of optimizer state; needs stage >= 1."""
    offload_parameters: DeepSpeedOffload | None = None
    """Offload of parameters; needs stage 3."""
    staging: Literal["auto", "per_step", "per_use"] = "auto"
    """When masks, quantisers and rotations of weights run: at every use; `per_step` is refused here."""

    @model_validator(mode="after")
    def _check(self) -> DeepSpeedEngine:
        if self.staging == "per_step":
            raise ConfigError(
                "engine.staging=per_step is not for DeepSpeed, whose flat partitions hold no whole rows of a weight; "
                "set engine.staging=per_use, or type engine=fsdp"
            )
        if self.offload_optimizer is not None and self.stage == 0:
            raise ConfigError("offload_optimizer needs stage 1, 2 or 3, got stage 0; set engine.stage=2")
        if self.offload_parameters is not None and self.stage != 3:
            raise ConfigError(f"offload_parameters needs stage 3, got stage {self.stage}; set engine.stage=3")
        return self


EngineConfig = Annotated[
    AutoEngine | SingleEngine | DdpEngine | FsdpEngine | DeepSpeedEngine, Field(discriminator="type")
]


class SpreadExperts(Config):
    """Groups of `ep` ranks share the experts of each layer evenly; tokens travel to them."""

    type: Literal["spread"] = "spread"


class FullyShardedExperts(Config):
    """Experts and their optimizer state sharded over all ranks, each expert on one (Hecate, arXiv:2502.02581).

    Ranks fetch copies of those that they have many tokens for, for the length of a micro-batch.
    """

    type: Literal["fully_sharded"] = "fully_sharded"
    materialise: Literal["fewest_bytes", "loaded"] = "fewest_bytes"
    """Which experts a rank fetches: those whose copy moves fewer bytes than their tokens would, while the other
    tokens travel; or all that it has tokens for (`loaded`), so that none travels."""
    rematerialise: bool = True
    """Drop copies after forward and fetch them again in backward; false keeps them in between."""
    move_every_steps: int | None = Field(default=100, ge=1)
    """Optimizer steps after which experts move, with their optimizer state, to owners chosen by the load since the
    last time; None leaves them where they are."""


class LayoutConfig(Config):
    """How ranks share the work: all are dp_replicate x dp_shard x tp; groups of `ep` or `cp` among them share more."""

    ep: int = Field(default=1, ge=1)
    """Ranks that share the experts of each layer: each holds num_experts / ep of them, and tokens travel to their
    experts. They read different data all the same. 1 leaves all experts on every rank."""
    expert_chunks: int = Field(default=1, ge=1, le=64)
    """Pieces of a rank's tokens that travel to their experts one after the other, with `ep`: while one is computed the
    next is under way, in forward and in backward. More pieces are smaller products; 2 to 4 where travel is slow."""
    expert_resend: bool = False
    """With `ep` or fully sharded experts, and `train.activation_checkpointing: full`, send tokens to their experts once
    more in backward, instead of keeping what came from other ranks: less memory, more travel."""
    dp_shard: int | None = Field(default=None, ge=1)
    """Ranks that a parameter is sharded over, under `engine=fsdp`; the same as `engine.shard_size`. None: all ranks."""
    dp_replicate: int | None = Field(default=None, ge=1)
    """Replicas of the sharded model. None: whatever dp_shard leaves of the ranks."""
    tp: int = Field(default=1, ge=1)
    """Neighbouring ranks that share each layer's matmuls (tensor parallel): each holds some attention heads,
    some of the MLP's width and some of the vocabulary. They read the same data. 1 shares none."""
    sequence_parallel: bool = False
    """With `tp`, split tokens over its ranks between shared matmuls: norms and the residual stream of decoder blocks
    are 1 / `tp` on each. What travels is the same; what is kept for backward is less."""
    cp: int = Field(default=1, ge=1)
    """Neighbouring ranks that share every row (context parallel): each has the tokens of one part of it, and meets the
    others' in attention. They read the same data, and hold or shard weights as ranks that read different data do. 1
    leaves rows whole."""
    cp_attention: Literal["ulysses", "all_gather"] = "ulysses"
    """How ranks that share rows attend. `ulysses`: each to whole rows with some of the heads, which it gives places
    for; `cp` divides the heads. `all_gather`: each with all heads of its own places, to keys and values of all."""
    cp_rows: Literal["even", "by_document"] = "even"
    """What a rank has of rows that are shared. `even`: 1 / `cp` of each. `by_document`: whole documents of a
    micro-batch, and parts of those alone that would take one rank longer than the others; less travels, and padding
    is not computed."""
    pp: int = Field(default=1, ge=1)
    """Ranks that each have some of the model's blocks and hand on hidden states (pipeline parallel), world size / pp
    apart. They read the same data; ranks with the same blocks replicate or shard them. 1 leaves the model whole."""
    pp_schedule: Schedule = "1f1b"
    """In which order ranks take the micro-batches of a step. `gpipe`: all forwards, then all backwards. `1f1b`: a
    backward as soon as it can be, which keeps at most `pp` micro-batches. `interleaved_1f1b`: several stages a rank, so
    that ranks wait less and send more. `zbv`: two stages a rank, there and back, and gradients of weights where a rank
    would wait. All but `gpipe` need `pp` micro-batches or more a step."""
    pp_split: Literal["balance"] | tuple[int, ...] = "balance"
    """First block of each stage, e.g. [0, 5]; `balance` makes the largest stage's parameters as few as can be."""
    experts: Annotated[SpreadExperts | FullyShardedExperts, Field(discriminator="type")] = SpreadExperts()
    """Where the experts of each layer are: `spread` over groups of `ep` ranks, or `fully_sharded` over all ranks."""
    low_comm: OuterConfig | None = None
    """Workers that step without each other and exchange what they learned now and then; the rest of the layout is
    that of one worker. null: all ranks step together."""

    @field_validator("experts", mode="before")
    @classmethod
    def _expand_experts(cls, value: Any) -> Any:
        # Only the one has options, so naming one of them asks for it.
        if isinstance(value, str):
            return {"type": value}
        return {"type": "fully_sharded", **value} if isinstance(value, dict) else value

    @property
    def num_workers(self) -> int:
        """Groups of ranks that step without each other; 1 where all step together."""
        return 1 if self.low_comm is None else self.low_comm.workers

    @property
    def tokens_travel(self) -> bool:
        """Whether tokens may go to experts of other ranks."""
        return self.ep > 1 or isinstance(self.experts, FullyShardedExperts)

    def data_size(self, world_size: int) -> int:
        """Return how many ranks read different data.

        Raises:
            ConfigError: `tp`, `cp` or `pp` does not divide the ranks.
        """
        for key, size in (("tp", self.tp), ("cp", self.cp), ("pp", self.pp)):
            if world_size % size:
                near = near_divisors(size, world_size)
                ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
                raise ConfigError(f"layout.{key}={size} does not divide the {ranks}; set layout.{key}={near}")
        if world_size % (self.tp * self.cp):
            raise ConfigError(
                f"layout.tp={self.tp} x layout.cp={self.cp} do not divide the {world_size} ranks; set one to 1, or "
                f"start a multiple of {self.tp * self.cp} ranks"
            )
        return world_size // (self.tp * self.cp * self.pp)

    def num_expert_ranks(self, world_size: int) -> int:
        """Return how many ranks share the experts of a layer."""
        return world_size if isinstance(self.experts, FullyShardedExperts) else self.ep
