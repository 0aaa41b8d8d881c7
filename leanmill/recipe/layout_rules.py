"""What must hold between the layout of ranks and the engine, the optimizer and the model. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from leanmill.core.near import near_divisors, near_multiples
from leanmill.models.expert_sizes import NUM_EXPERTS
from leanmill.parallel.context_plan import context_problems
from leanmill.parallel.pipeline_plan import pipeline_problems
from leanmill.parallel.sequence_plan import sequence_problems


if TYPE_CHECKING:
    from leanmill.recipe.sections import Sections


def layout_problems(recipe: Sections) -> Iterator[str]:
    """Yield what cannot hold on any number of ranks; the rest is for `leanmill.parallel.layout`."""
    yield from _sharding(recipe)
    if recipe.layout.tp > 1:
        yield from _shared_matmuls(recipe)
    elif recipe.layout.sequence_parallel:
        yield "layout.sequence_parallel splits tokens over ranks that share matmuls; set layout.tp, or remove it"
    if recipe.layout.cp > 1:
        yield from _shared_rows(recipe)
    else:
        for key, default in (("cp_attention", "ulysses"), ("cp_rows", "even")):
            if (value := getattr(recipe.layout, key)) != default:
                yield f"layout.{key}={value} is about rows that ranks share; set layout.cp, or remove it"
    if recipe.layout.pp > 1:
        yield from _pipeline(recipe)
    elif (recipe.layout.pp_schedule, recipe.layout.pp_split) != ("1f1b", "balance"):
        key = "pp_schedule" if recipe.layout.pp_split == "balance" else "pp_split"
        yield f"layout.{key} is about ranks that each have some blocks; set layout.pp, or remove it"
    if recipe.layout.experts.type == "fully_sharded":
        yield from _fully_sharded(recipe)
    elif recipe.layout.ep > 1:
        yield from _experts(recipe)
    yield from _exchange(recipe)
    if recipe.layout.low_comm is not None:
        yield from _workers(recipe)


def _sharding(recipe: Sections) -> Iterator[str]:
    layout, engine = recipe.layout, recipe.engine
    if engine.type == "fsdp":
        if None not in (engine.shard_size, layout.dp_shard) and engine.shard_size != layout.dp_shard:
            yield (
                f"engine.shard_size={engine.shard_size} and layout.dp_shard={layout.dp_shard} name the same number of "
                f"ranks; keep one"
            )
        return
    if engine.type == "deepspeed":
        for key in ("dp_shard", "dp_replicate"):
            if getattr(layout, key) is not None:
                yield f"layout.{key} is not for DeepSpeed, which shards over all ranks; remove it, or type engine=fsdp"
    elif engine.type in ("ddp", "single") and layout.dp_shard not in (None, 1):
        yield (
            f"layout.dp_shard={layout.dp_shard} shards parameters, and engine={engine.type} keeps whole ones; type "
            f"engine=fsdp, or remove it"
        )


def _shared_work(recipe: Sections, key: str, shared: str) -> Iterator[str]:
    """What holds of matmuls and of rows that ranks share."""
    asked, engine = f"layout.{key}={getattr(recipe.layout, key)}", recipe.engine
    if engine.type == "single":
        yield f"{asked} shares {shared} among ranks, and engine=single is one; type engine=ddp or engine=fsdp"
    if engine.type == "deepspeed":
        yield f"{asked} is for engines on torch alone, not for DeepSpeed; type engine=fsdp, or remove it"
    if recipe.layout.tokens_travel:
        yield f"{asked} does not go together with experts that ranks share; set layout.{key}=1, or keep experts whole"
    if recipe.model.task != "causal_lm":
        yield f"{asked} is for causal language models, and model.task={recipe.model.task}; set layout.{key}=1"


def _shared_matmuls(recipe: Sections) -> Iterator[str]:
    layout, engine = recipe.layout, recipe.engine
    asked = f"layout.tp={layout.tp}"
    yield from _shared_work(recipe, "tp", "matmuls")
    if engine.type == "fsdp" and engine.gather == "packed":
        yield f"{asked} stages weights at every use, and engine.gather=packed sends staged ones; set engine.gather=full"
    if engine.type != "deepspeed" and engine.staging == "per_step":
        yield f"{asked} stages weights that ranks share at every use; set engine.staging=auto"
    if recipe.optimizer.type == "adamw8bit":
        yield (
            f"{asked} cuts weights where optimizer.type=adamw8bit keeps whole blocks of state; set optimizer.type=adamw"
        )
    if recipe.train.compile:
        yield f"{asked} sends activations in the middle of compiled blocks, which fails; set train.compile=false"
    config = recipe.model.family_config or {}
    for key in ("num_attention_heads", "num_key_value_heads"):
        number = config.get(key)
        if isinstance(number, int) and number > 0 and number % layout.tp:
            near = near_divisors(layout.tp, number)
            yield f"{asked} does not divide model.config.{key}={number}; set layout.tp={near}"
    if layout.sequence_parallel:
        length, parts = recipe.data.sequence_length, layout.tp * layout.cp
        if length % parts:
            near = near_multiples(length, parts)
            asked += f" x layout.cp={layout.cp}" * (layout.cp > 1)
            yield (
                f"layout.sequence_parallel: {asked} does not divide data.sequence_length={length}; set "
                f"data.sequence_length={near}, or layout.sequence_parallel=false"
            )
        yield from sequence_problems(config, layout.tp)


def _shared_rows(recipe: Sections) -> Iterator[str]:
    layout = recipe.layout
    asked = f"layout.cp={layout.cp}"
    yield from _shared_work(recipe, "cp", "rows")
    if layout.tp > 1 and layout.cp_rows != "even":
        yield f"layout.cp_rows={layout.cp_rows} has not been shown to hold beside layout.tp={layout.tp}; remove it"
    if layout.low_comm is not None:
        yield f"{asked} has not been shown to hold beside layout.low_comm; set layout.cp=1, or remove layout.low_comm"
    if recipe.train.compile:
        yield f"{asked} sends keys and values in the middle of compiled blocks; set train.compile=false"
    if recipe.model.attention not in ("auto", "sdpa"):
        yield f"{asked} has an attention of its own, not model.attention={recipe.model.attention}; remove it"
    if recipe.data.sequence_length % layout.cp:
        near = near_divisors(layout.cp, recipe.data.sequence_length)
        yield f"{asked} does not divide data.sequence_length={recipe.data.sequence_length}; set layout.cp={near}"
    yield from context_problems(recipe.model.family_config or {}, layout.cp, layout.cp_attention, layout.tp)


def _pipeline(recipe: Sections) -> Iterator[str]:
    layout, engine = recipe.layout, recipe.engine
    asked = f"layout.pp={layout.pp}"
    yield from _shared_work(recipe, "pp", "blocks")
    for key, size in (("tp", layout.tp), ("cp", layout.cp)):
        if size > 1:
            yield f"{asked} has not been shown to hold beside layout.{key}={size}; set one of the two to 1"
    if layout.low_comm is not None:
        yield f"{asked} has not been shown to hold beside layout.low_comm; set layout.pp=1, or remove layout.low_comm"
    if recipe.train.compile:
        yield f"{asked} has not been shown to hold with compiled blocks; set train.compile=false"
    if engine.type == "fsdp" and engine.cpu_offload:
        yield f"{asked} moves a rank's blocks to its device, and engine.cpu_offload keeps them on the host; remove it"
    if layout.pp_schedule == "zbv" and engine.type == "fsdp":
        yield (
            f"{asked} with layout.pp_schedule=zbv takes backward apart, which sharded blocks do not allow; type "
            f"engine=ddp, or set layout.pp_schedule=interleaved_1f1b"
        )
    if layout.pp_schedule == "zbv" and recipe.train.activation_checkpointing == "selective":
        yield (
            f"{asked} with layout.pp_schedule=zbv goes back through a block twice, and what selective recomputation "
            f"keeps serves once; set train.activation_checkpointing=full, or layout.pp_schedule=interleaved_1f1b"
        )
    split = None if layout.pp_split == "balance" else layout.pp_split
    yield from pipeline_problems(recipe.model.family_config or {}, layout.pp, layout.pp_schedule, split)


def _experts(recipe: Sections) -> Iterator[str]:
    ep, engine = recipe.layout.ep, recipe.engine
    if engine.type == "single":
        yield f"layout.ep={ep} spreads experts over ranks, and engine=single is one; type engine=fsdp, or layout.ep=1"
    if engine.type == "deepspeed":
        for field in ("offload_optimizer", "offload_parameters"):
            offload = getattr(engine, field)
            if offload is not None and offload.device == "nvme":
                yield (
                    f"layout.ep={ep} has not been proved with engine.{field}.device=nvme, which swaps partitions of "
                    f"parameters in groups of their own; set engine.{field}.device=cpu, or layout.ep=1"
                )
    if recipe.optimizer.type == "adamw8bit" and engine.type != "ddp":
        yield (
            f"layout.ep={ep} with optimizer.type=adamw8bit runs under engine=ddp alone: torchao's compiled update "
            f"takes no experts that are sharded once more; type engine=ddp, or set optimizer.type=adamw"
        )
    config = recipe.model.family_config or {}
    for key in NUM_EXPERTS:
        number = config.get(key)
        if isinstance(number, int) and number > 0 and number % ep:
            yield (
                f"layout.ep={ep} does not divide model.config.{key}={number}; set layout.ep={near_divisors(ep, number)}"
            )


def _exchange(recipe: Sections) -> Iterator[str]:
    layout, kept = recipe.layout, recipe.train.activation_checkpointing
    of_travel = {"expert_chunks": layout.ep > 1, "expert_resend": layout.tokens_travel}
    for key, does_something in of_travel.items():
        value = getattr(layout, key)
        if not does_something and value != type(layout).model_fields[key].default:
            yield (
                f"layout.{key}={str(value).lower()} is about tokens that travel to experts of other ranks, and "
                f"with layout.ep=1 none do; set layout.ep, or remove it"
            )
    if layout.tokens_travel and layout.expert_resend and kept != "full":
        yield (
            f"layout.expert_resend=true has recomputation send tokens once more, and train.activation_checkpointing="
            f"{kept} recomputes no experts of other ranks; set train.activation_checkpointing=full, or remove it"
        )


def _fully_sharded(recipe: Sections) -> Iterator[str]:
    engine, asked = recipe.engine, "layout.experts=fully_sharded"
    if recipe.layout.ep > 1:
        yield f"{asked} shards experts over all ranks, and layout.ep={recipe.layout.ep} over groups of them; remove one"
    if engine.type == "single":
        yield f"{asked} shards experts over ranks, and engine=single is one; type engine=fsdp, or remove it"
    if engine.type == "deepspeed":
        yield (
            f"{asked} moves experts and their optimizer state between ranks, which DeepSpeed's flat partitions do not "
            f"allow; type engine=fsdp or engine=ddp, or spread experts with layout.ep"
        )
    if engine.type == "fsdp" and engine.cpu_offload:
        yield (
            f"{asked} sends experts from where they are kept, and engine.cpu_offload keeps them in host memory; remove "
            f"the offload, or spread experts with layout.ep"
        )
    if recipe.optimizer.type == "adamw8bit":
        yield (
            f"{asked} moves experts one by one, and optimizer.type=adamw8bit keeps blocks of state across their ends; "
            f"set optimizer.type=adamw, or remove {asked}"
        )


def _workers(recipe: Sections) -> Iterator[str]:
    """What needs all ranks in each step, which workers are not."""
    layout, engine, train, every = recipe.layout, recipe.engine, recipe.train, recipe.eval.every_steps
    assert layout.low_comm is not None
    asked, steps = f"layout.low_comm={layout.low_comm.type}", layout.low_comm.every_steps
    if engine.type == "deepspeed":
        yield f"{asked} has workers step alone, and DeepSpeed reduces over all ranks; type engine=ddp or engine=fsdp"
    if layout.tokens_travel:
        yield f"{asked} has not been shown to hold where ranks share experts; keep them whole, or remove it"
    if layout.tp > 1:
        yield f"{asked} has not been shown to hold where ranks share matmuls; set layout.tp=1, or remove it"
    if train.non_finite != "stop" or train.spike is not None:
        key = "train.spike" if train.non_finite == "stop" else f"train.non_finite={train.non_finite}"
        remedy = "train.spike=null" if train.non_finite == "stop" else "train.non_finite=stop"
        yield f"{key} keeps a step back on all ranks, and {asked} has workers step alone; set {remedy}"
    if every is not None and every % steps:
        yield (
            f"eval.every_steps={every}: {asked} has all ranks meet every {steps} steps only; "
            f"set eval.every_steps={near_multiples(every, steps)}"
        )
    for technique in recipe.techniques:
        if not technique.holds_where_workers_drift():
            name: str = technique.type  # type: ignore[attr-defined]
            yield f"{name} has not been shown to hold where workers step alone; remove it, or layout.low_comm"
