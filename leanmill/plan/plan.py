"""What a run will need, predicted from shapes: parameters, memory of a rank by part, tokens and FLOPs.

The model is built on the meta device with its techniques installed, so nothing is allocated and no
device is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from leanmill.core.blocks import decoder_blocks
from leanmill.core.errors import ConfigError
from leanmill.core.parameters import TrainableSchedule
from leanmill.core.paths import expand_user
from leanmill.core.sites import staged_parameters
from leanmill.core.staging import staged_once
from leanmill.core.technique import InstallContext
from leanmill.kernels.linear_cross_entropy.chunks import rows_a_chunk
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.counting import num_active_parameters, num_parameters
from leanmill.models.flops import flops_per_token
from leanmill.parallel.config import (
    AutoEngine,
    DdpEngine,
    DeepSpeedEngine,
    EngineConfig,
    FsdpEngine,
    SingleEngine,
)
from leanmill.parallel.naming import state_parameters
from leanmill.parallel.staging import fits, is_table
from leanmill.plan.fit import Case, remedies
from leanmill.plan.memory import Memory, Weight, estimate, staged_copies
from leanmill.recipe.root import Recipe
from leanmill.recipe.rules import derive_steps
from leanmill.trainer.prepare import install_techniques, with_precision
from leanmill.trainer.turns import Turns


DEFAULT_RANK_MEMORY_GIB = 80.0
"""Memory of one rank that `engine: auto` is decided with, unless told."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predictions for one recipe on `world_size` ranks. Plain numbers; bytes are of one rank."""

    recipe: str
    world_size: int
    num_nodes: int
    engine: str
    why_engine: str
    num_parameters: int
    """Of the plain model, tied weights once."""
    num_active: int
    """Parameters one token passes through: of experts, only the chosen ones."""
    num_trainable: int
    """With techniques installed; where parameters take turns, the most that train at once."""
    num_technique: int
    """Elements that techniques add: adapters, learned scales, masks."""
    memory: Memory
    rank_memory_bytes: int
    """What a rank was taken to have."""
    remedies: dict[str, int]
    """Where a rank has too little: what to type, and the peak after it; see `leanmill.plan.fit`."""
    alternatives: dict[str, Memory]
    """The same run under every other engine that fits `world_size`."""
    tokens_per_step: int
    num_micro_batches: int
    num_steps: int
    total_tokens: int
    flops_per_token: float
    flops_per_step: float
    total_flops: float

    @property
    def held_bytes(self) -> int:
        """Model, gradients, optimizer state and lasting buffers on the device, at the end of a backward."""
        return sum(self.memory.held.values())

    @property
    def peak_bytes(self) -> int:
        """Everything on the device at once: held and transient parts."""
        return self.memory.peak

    @property
    def fits(self) -> bool:
        """Whether the peak is at most what a rank was taken to have."""
        return self.peak_bytes <= self.rank_memory_bytes

    @property
    def host_bytes(self) -> int:
        """Offloaded to host memory or NVMe."""
        return sum(self.memory.host.values())

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-able values, totals included."""
        totals = {"held_bytes": self.held_bytes, "peak_bytes": self.peak_bytes, "host_bytes": self.host_bytes}
        totals["fits"] = self.fits
        return {**asdict(self), **totals}


def plan(
    recipe: Recipe,
    world_size: int = 1,
    gpus_per_node: int | None = None,
    *,
    rank_memory_gib: float = DEFAULT_RANK_MEMORY_GIB,
) -> Plan:
    """Predict a run.

    Args:
        recipe: The validated recipe.
        world_size: Ranks of the run.
        gpus_per_node: Ranks of one machine; None puts all on one.
        rank_memory_gib: Memory of a rank, GiB: what `engine: auto` decides by and the peak is held against.

    Raises:
        ConfigError: The recipe cannot run on these ranks.
    """
    recipe = with_precision(recipe, "cpu" if recipe.device == "cpu" or not torch.cuda.is_available() else "cuda")
    per_node = gpus_per_node or world_size
    if world_size % per_node:
        raise ConfigError(f"{world_size} ranks do not fill machines of {per_node}; give --nodes and --gpus-per-node")
    num_micro_batches, num_steps = derive_steps(recipe, world_size)
    trained_tokenizer = recipe.data.tokenizer.path is None
    model = build_on_meta(
        recipe.model,
        vocab_size=recipe.data.tokenizer.vocab_size if trained_tokenizer else None,
        sequence_length=recipe.data.sequence_length,
        device_type="cpu" if recipe.device == "cpu" else "cuda",
    )
    num_total, num_active = num_parameters(model)[0], num_active_parameters(model)
    flops = flops_per_token(model, recipe.data.sequence_length)
    context = InstallContext(
        load_frozen_model=_no_loading,
        vocab_size=model.config.vocab_size,
        seed=recipe.seed,
        frozen_config=lambda path: _frozen_model(recipe, path).config,
    )
    techniques = install_techniques(recipe.techniques, model, context)
    weights = list(_weights(model, techniques.trainable_schedule))
    engine, why = _engine(recipe, world_size, per_node, 4 * num_total, rank_memory_gib)

    teachers, available = _teacher_sizes(recipe), int(rank_memory_gib * 2**30)

    def memory_of(case: Case) -> Memory:
        changed, config = case.recipe, model.config
        memory = estimate(
            _with_staging_settled(case.engine, weights, case, available),
            changed.optimizer,
            weights,
            world_size=case.world_size,
            precision=changed.train.precision,
            num_micro_batches=derive_steps(changed, case.world_size)[0],
        )
        memory.add("transient", "activations", activation_bytes(changed, config))
        memory.add("transient", "logits", logits_bytes(changed, config.vocab_size, config.hidden_size))
        memory.add("held", "teacher", _teacher_bytes(teachers, case))
        return memory

    asked = Case(recipe=recipe, engine=engine, world_size=world_size)
    memory = memory_of(asked)
    tried = [] if memory.peak <= available else remedies(asked, lambda case: memory_of(case).peak, available)
    num_all = sum(w.numel for w in weights)
    return Plan(
        recipe=recipe.name,
        world_size=world_size,
        num_nodes=world_size // per_node,
        engine=_label(engine),
        why_engine=why,
        num_parameters=num_total,
        num_active=num_active,
        num_trainable=sum(w.numel for w in weights if w.trainable),
        num_technique=num_all - num_total,
        memory=memory,
        rank_memory_bytes=available,
        remedies=dict(tried),
        alternatives={_label(other): memory_of(replace(asked, engine=other)) for other in _candidates(world_size)},
        tokens_per_step=recipe.batch.tokens_per_step,
        num_micro_batches=num_micro_batches,
        num_steps=num_steps,
        total_tokens=num_steps * recipe.batch.tokens_per_step,
        flops_per_token=flops,
        flops_per_step=flops * recipe.batch.tokens_per_step,
        total_flops=flops * recipe.batch.tokens_per_step * num_steps,
    )


def activation_bytes(recipe: Recipe, config: Any) -> int:
    """Estimate the activations that one micro-batch keeps for backward.

    For each token and layer of a pre-norm block with gated MLP, in compute dtype: two norms' outputs,
    query, key, value, attention's output in and out of its reshape (4 widths), and 4 tensors of
    the MLP's width (of top_k experts); in fp32: what each of the two norms keeps. With `full` recomputation a
    layer keeps its input and one layer is alive at a time; `selective` also keeps matmul outputs.
    """
    size = 2 if recipe.train.precision == "bf16" else 4
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    queries = heads * head_dim
    keys = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    top_k = getattr(config, "num_experts_per_tok", None)
    if isinstance(top_k, int):
        inner = top_k * (getattr(config, "moe_intermediate_size", None) or inner)
    whole = size * (2 * hidden + 3 * queries + 2 * keys + 4 * inner) + 4 * 4 * hidden
    matmuls = size * (2 * hidden + 2 * queries + 2 * keys + 2 * inner)
    tokens, layers = recipe.batch.tokens_per_micro_batch, config.num_hidden_layers
    kept = {
        "none": layers * whole,
        "selective": layers * (matmuls + size * hidden) + whole,
        "full": layers * size * hidden + whole,
    }
    return int(tokens * kept[recipe.train.activation_checkpointing])


def logits_bytes(recipe: Recipe, vocab_size: int, hidden_size: int) -> int:
    """Estimate what the loss keeps at once: logits of a chunk of tokens and the head's fp32 gradient.

    That gradient is made with the loss, before backward reaches the head. A teacher brings logits of
    its own.
    """
    size = 2 if recipe.train.precision == "bf16" else 4
    num_models = 1 + sum(technique.num_frozen_logits() for technique in recipe.techniques)
    chunk = recipe.train.logits_chunk_tokens
    rows = rows_a_chunk(
        torch.empty(0, hidden_size, dtype=torch.bfloat16 if size == 2 else torch.float32),
        torch.empty(vocab_size, 0),
        None if chunk == "auto" else chunk,
        logits_alive=num_models,
    )
    tokens = min(rows, recipe.batch.tokens_per_micro_batch)
    return num_models * tokens * vocab_size * size + 4 * vocab_size * hidden_size


def _weights(model: nn.Module, schedule: TrainableSchedule | None) -> Iterator[Weight]:
    """Every parameter; of those that take turns, the set that takes the most memory counts as trained."""
    at_once = None if schedule is None else Turns(schedule, model).heaviest()
    block_of = {id(p): index for index, block in enumerate(decoder_blocks(model)) for p in block.parameters()}
    staged = {id(p) for p in staged_parameters(model)}
    whole, in_parts = (staged_once(model, in_parts=in_parts)[0] for in_parts in (False, True))
    once, once_in_parts = ({id(weight.raw) for weight in found} for found in (whole, in_parts))
    tables = {id(weight.raw) for weight in whole if is_table(weight)}
    for name, parameter in state_parameters(model):
        yield Weight(
            tuple(parameter.shape),
            parameter.element_size(),
            parameter.requires_grad and (at_once is None or name in at_once),
            block_of.get(id(parameter)),
            staged=id(parameter) in staged,
            once_whole=id(parameter) in once,
            once_in_parts=id(parameter) in once_in_parts,
            is_table=id(parameter) in tables,
        )


def _with_staging_settled(
    engine: EngineConfig, weights: Sequence[Weight], case: Case, memory_bytes: int
) -> EngineConfig:
    """Return the engine with `staging: auto` replaced by what a rank of so much memory takes."""
    if engine.staging != "auto":
        return engine
    copies = staged_copies(engine, weights, case.world_size, case.recipe.train.precision)
    return engine.model_copy(update={"staging": "per_step" if fits(copies, memory_bytes) else "per_use"})


def _engine(
    recipe: Recipe, world_size: int, per_node: int, model_bytes: int, rank_memory_gib: float
) -> tuple[EngineConfig, str]:
    """Return the engine that would run, and why."""
    from leanmill.parallel.build import choose_engine
    from leanmill.parallel.launch import Ranks

    engine = recipe.engine
    if isinstance(engine, AutoEngine):
        ranks = Ranks(
            rank=0, world_size=world_size, local_rank=0, device=torch.device("cpu"), local_world_size=per_node
        )
        return choose_engine(
            ranks=ranks,
            precision="bf16" if recipe.train.precision == "bf16" else "fp32",
            model_bytes=model_bytes,
            memory_bytes=int(rank_memory_gib * 2**30),
        )
    if isinstance(engine, SingleEngine) and world_size > 1:
        raise ConfigError(f"engine=single runs one process, not {world_size}; type engine=ddp or engine=fsdp")
    if isinstance(engine, FsdpEngine) and engine.shard_size is not None and world_size % engine.shard_size:
        raise ConfigError(
            f"engine.shard_size={engine.shard_size} does not divide {world_size} ranks; remove it, or set a divisor"
        )
    return engine, "as the recipe asks"


def _candidates(world_size: int) -> list[EngineConfig]:
    if world_size == 1:
        return [SingleEngine()]
    stages: tuple[Any, ...] = (0, 1, 2, 3)
    return [DdpEngine(), FsdpEngine(), *(DeepSpeedEngine(stage=stage) for stage in stages)]


def _label(engine: EngineConfig) -> str:
    if isinstance(engine, DeepSpeedEngine):
        offloads = [name for name in ("optimizer", "parameters") if getattr(engine, f"offload_{name}") is not None]
        return f"deepspeed ZeRO-{engine.stage}" + (f" + offload of {' and '.join(offloads)}" if offloads else "")
    if isinstance(engine, FsdpEngine):
        return (
            f"fsdp{f' x{engine.shard_size}' if engine.shard_size else ''}{' + offload' if engine.cpu_offload else ''}"
        )
    return engine.type


def _teacher_sizes(recipe: Recipe) -> tuple[int, int]:
    """Elements of the frozen models that techniques read, each once, and those of their blocks; 0 without any."""
    whole = in_blocks = 0
    for path in {path for t in recipe.techniques for path in t.frozen_models().values()}:
        teacher = _frozen_model(recipe, path)
        whole += sum(p.numel() for p in teacher.parameters())
        in_blocks += sum(p.numel() for block in decoder_blocks(teacher) for p in block.parameters())
    return whole, in_blocks


def _frozen_model(recipe: Recipe, path: str) -> Any:
    key = next(key for t in recipe.techniques for key, named in t.frozen_models().items() if named == path)
    if not expand_user(path).is_dir() and path.startswith(("/", ".", "~")):
        raise ConfigError(f"{key} {path!r} does not exist; correct the path")
    return build_on_meta(ModelConfig(path=path, trust_remote_code=recipe.model.trust_remote_code))


def _teacher_bytes(sizes: tuple[int, int], case: Case) -> float:
    """Bytes of the teachers on one rank; whole but for FSDP, which shards its blocks."""
    whole, blocks = sizes
    size = 2 if case.recipe.train.precision == "bf16" else 4
    if not isinstance(case.engine, FsdpEngine):
        return float(size * whole)
    return size * (whole - blocks + blocks / (case.engine.shard_size or case.world_size))


def _no_loading(path: str) -> nn.Module:
    raise ConfigError(f"planning loads no weights, but a technique asked for {path} at installation")
