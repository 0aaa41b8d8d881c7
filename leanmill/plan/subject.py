"""The model of a run as shapes: built on the meta device with its techniques installed, and the memory it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from leanmill.core.blocks import added_blocks, decoder_blocks
from leanmill.core.branches import branch_modules, branched_layers, bytes_watched
from leanmill.core.compact import bytes_decoded
from leanmill.core.errors import ConfigError
from leanmill.core.names import clean_name
from leanmill.core.parameters import PLAIN, settings_by_name
from leanmill.core.sites import iter_sites, staged_parameters
from leanmill.core.staging import staged_once
from leanmill.core.technique import InstallContext, InstalledTechniques, token_shares
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.counting import num_active_parameters, num_parameters
from leanmill.models.flops import flops_per_token
from leanmill.parallel.config import (
    DeepSpeedEngine,
    EngineConfig,
    FsdpEngine,
    FullyShardedExperts,
    LayoutConfig,
)
from leanmill.parallel.context_plan import seen_bytes
from leanmill.parallel.context_shares import MAX_TOKENS
from leanmill.parallel.expert_parallel import check_experts, expert_modules, num_held_parameters
from leanmill.parallel.layout import resolve_layout
from leanmill.parallel.naming import state_parameters
from leanmill.parallel.staging import fits, is_table
from leanmill.parallel.tensor_plan import split_dims
from leanmill.plan.fit import Case
from leanmill.plan.memory import estimate, optimizer_bytes, shard_numel, staged_copies
from leanmill.plan.transient import activation_bytes, logits_bytes
from leanmill.plan.weight import Memory, Weight
from leanmill.recipe.root import Recipe
from leanmill.recipe.rules import micro_batches_of_step
from leanmill.trainer.beginning import saved_names
from leanmill.trainer.frozen import frozen_flops_per_token, frozen_on_meta, frozen_paths
from leanmill.trainer.prepare import compact_weights, install_techniques
from leanmill.trainer.turns import Turns


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What of a run's model decides its memory and work."""

    num_parameters: int
    """Of the plain model, tied weights once."""
    num_active: int
    """Parameters one token passes through: of experts, only the chosen ones."""
    num_held: int
    """Those that a rank without sharding holds: of experts that ranks share, its own."""
    flops_per_token: float
    weights: list[Weight]
    """Every parameter, those of techniques included."""
    names: list[str]
    """Of those, in order."""
    teacher_sizes: tuple[int, int]
    """Elements of the frozen models beside it, each once, and those of their blocks."""
    token_shares: list[float]
    """Of a row's tokens, what each block runs for."""
    config: Any
    """The model's own."""

    @classmethod
    def of(cls, recipe: Recipe, world_size: int, to_come: Mapping[str, ModelConfig] | None = None) -> Subject:
        """Build the model of a recipe and install its techniques, without memory.

        Args:
            recipe: The recipe.
            world_size: Ranks that may share experts.
            to_come: See `frozen_on_meta`.

        Raises:
            ConfigError: A technique does not fit the model, or a frozen model is not there.
        """
        if recipe.layout.pp > 1:
            raise ConfigError(
                f"layout.pp={recipe.layout.pp} gives ranks different blocks, and plan counts ranks that are alike; "
                f"plan with layout.pp=1: a stage holds its share of weights, gradients and optimizer state, and with "
                f"1f1b the activations of its blocks of at most pp micro-batches"
            )
        model = plain_model(recipe)
        # Before techniques add theirs.
        num_total, num_active = num_parameters(model)[0], num_active_parameters(model)
        num_sharers = recipe.layout.num_expert_ranks(world_size)
        check_experts(model, num_sharers, is_even=recipe.layout.experts.type == "spread")
        split = split_dims(model, recipe.layout.tp)
        num_held = num_held_parameters(model, num_sharers, split, recipe.layout.tp)
        shares = token_shares(recipe.techniques, len(decoder_blocks(model)))
        further = sum(technique.further_tokens() for technique in recipe.techniques)
        flops = flops_per_token(model, recipe.data.sequence_length, shares, further_tokens=further)
        flops += frozen_flops_per_token(recipe, to_come)
        context = InstallContext(
            load_frozen_model=_no_loading,
            vocab_size=model.config.vocab_size,  # type: ignore[union-attr, arg-type]
            seed=recipe.seed,
            frozen_config=lambda path: frozen_on_meta(recipe, path, to_come).config,
        )
        techniques = install_techniques(recipe.techniques, model, context)
        compact_weights(recipe, model)
        named = list(_weights(recipe, model, techniques))
        return cls(
            num_parameters=num_total,
            num_active=num_active,
            num_held=num_held,
            flops_per_token=flops,
            weights=[weight.split_along(split.get(name)) for name, weight in named],
            names=[name for name, _ in named],
            teacher_sizes=_teacher_sizes(recipe, to_come),
            token_shares=shares,
            config=model.config,
        )

    def shared_by(self, plain: nn.Module, layout: LayoutConfig, world_size: int) -> Subject:
        """Return the same model under another layout, without building it anew.

        Args:
            plain: See `plain_model`.
            layout: The other one.
            world_size: Ranks that may share experts.

        Raises:
            ConfigError: Ranks cannot share this model so.
        """
        num_sharers = layout.num_expert_ranks(world_size)
        check_experts(plain, num_sharers, is_even=layout.experts.type == "spread")
        split = split_dims(plain, layout.tp)
        return replace(
            self,
            num_held=num_held_parameters(plain, num_sharers, split, layout.tp),
            weights=[w.split_along(split.get(name)) for name, w in zip(self.names, self.weights, strict=True)],
        )

    def checkpoint_bytes(self, recipe: Recipe) -> int:
        """Return the size of a checkpoint: what is saved of the model, and the optimizer's state."""
        state = optimizer_bytes(recipe.optimizer, (w.numel for w in self.weights if w.trainable))
        written = sum(4 * w.numel * w.num_written for w in self.weights)
        return int(sum(w.num_bytes for w in self.weights if w.is_saved) + state + written)

    def memory(self, case: Case, rank_memory_bytes: int) -> Memory:
        """Return what a rank holds in one case."""
        memory = self.state_memory(case, rank_memory_bytes)
        self.add_micro_batch(memory, case)
        return memory

    def state_memory(self, case: Case, rank_memory_bytes: int) -> Memory:
        """Return what a rank holds of weights, gradients and optimizer state, and what moves them.

        Of the micro-batch it depends on nothing but whether a step has several.
        """
        changed = case.recipe
        layout = resolve_layout(changed.layout, case.engine, case.world_size)
        if isinstance(case.engine, FsdpEngine):
            case = replace(case, engine=case.engine.model_copy(update={"shard_size": layout.dp_shard}))
        sharers = layout.world_size // layout.ep if isinstance(case.engine, DeepSpeedEngine) else layout.expert_shard
        weights = [weight.on_rank(layout.ep, sharers).shared_by(layout.tp) for weight in self.weights]
        memory = estimate(
            _with_staging_settled(case.engine, weights, case, rank_memory_bytes),
            changed.optimizer,
            weights,
            world_size=layout.world_size // layout.tp,
            precision=changed.train.precision,
            num_micro_batches=micro_batches_of_step(changed, layout.data_size),
        )
        if changed.layout.low_comm is not None:
            _add_outer(memory, case.engine, [weight for weight in weights if weight.trainable])
        memory.add("held", "teacher", _teacher_bytes(self.teacher_sizes, case))
        return memory

    def add_micro_batch(self, memory: Memory, case: Case) -> None:
        """Add what a rank holds for a micro-batch."""
        changed, config = case.recipe, self.config
        layout = resolve_layout(changed.layout, case.engine, case.world_size)
        if layout.fully_sharded is not None:
            memory.add("transient", "fetched experts", self._fetched_bytes(changed, layout.fully_sharded))
        here = _with_own_tokens(changed)
        memory.add("transient", "activations", activation_bytes(here, config, self.token_shares))
        memory.add("transient", "logits", logits_bytes(here, config.vocab_size, config.hidden_size))
        if layout.cp > 1:
            length, tokens = changed.data.sequence_length, changed.batch.tokens_per_micro_batch
            if layout.cp_rows == "even" or layout.cp_attention == "all_gather":
                memory.add("transient", "attention mask", seen_bytes(tokens, length, layout.cp, layout.cp_attention))

    def _fetched_bytes(self, recipe: Recipe, experts: FullyShardedExperts) -> int:
        """Copies of all experts of a layer and their gradients, the most that a rank may fetch at once.

        Of every layer where nothing drops copies between forward and backward, with the gradients of one.
        """
        layers: dict[int | None, int] = {}
        for weight in self.weights:
            width = 2 if recipe.train.precision == "bf16" else weight.itemsize
            layers[weight.block] = layers.get(weight.block, 0) + weight.is_expert * weight.numel * width
        largest = max(layers.values(), default=0)
        is_kept = not experts.rematerialise and recipe.train.activation_checkpointing == "none"
        return largest + (sum(layers.values()) if is_kept else largest)


def plain_model(recipe: Recipe) -> nn.Module:
    """Build the model of a recipe on the meta device, before techniques change it."""
    return build_on_meta(
        recipe.model,
        vocab_size=recipe.data.trained_vocab_size,
        sequence_length=recipe.data.text_length,
        device_type="cpu" if recipe.device == "cpu" else "cuda",
    )


def _with_own_tokens(recipe: Recipe) -> Recipe:
    """Return the recipe with the tokens of a micro-batch that one rank has, where ranks share rows."""
    own = recipe.batch.tokens_per_micro_batch // recipe.layout.cp
    if recipe.layout.cp_rows == "by_document":
        own = int(own * MAX_TOKENS)
    return recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"tokens_per_micro_batch": own})})


def _add_outer(memory: Memory, engine: EngineConfig, trained: Sequence[Weight]) -> None:
    """Add what workers that step alone keep to meet by: where they met, the outer momentum, and how far they went."""
    size = (engine.shard_size or 1) if isinstance(engine, FsdpEngine) else 1
    num_bytes = sum(shard_numel(w, size) * w.itemsize for w in trained)
    is_offloaded = isinstance(engine, FsdpEngine) and engine.cpu_offload
    memory.add("host" if is_offloaded else "held", "outer optimizer state", 2 * num_bytes)
    memory.add("host" if is_offloaded else "transient", "outer gradients", 2 * num_bytes)


def _weights(recipe: Recipe, model: nn.Module, techniques: InstalledTechniques) -> Iterator[tuple[str, Weight]]:
    """Every parameter by its name; of those that take turns, the set that takes the most memory counts as trained."""
    schedule = techniques.trainable_schedule
    at_once = None if schedule is None else Turns(schedule, model).heaviest()
    blocks = [*decoder_blocks(model), *added_blocks(model)]
    block_of = {id(p): index for index, block in enumerate(blocks) for p in block.parameters()}
    staged = {id(p) for p in staged_parameters(model)}
    experts = {id(p): number for _, module, number in expert_modules(model) for p in module.parameters()}
    whole, in_parts = (staged_once(model, in_parts=in_parts)[0] for in_parts in (False, True))
    once, once_in_parts = ({id(weight.raw) for weight in found} for found in (whole, in_parts))
    decoded = {id(site.raw_weight): bytes_decoded(site) for _, site in iter_sites(model)}
    watched = _watched(model)
    tables = {id(weight.raw) for weight in whole if is_table(weight)}
    named = list(state_parameters(model))
    trained = [name for name, parameter in named if parameter.requires_grad]
    saved = saved_names(recipe, model, trained, freezes_base=techniques.freeze_base)
    settings = settings_by_name(techniques.param_rules, [clean_name(name) for name, _ in named])
    for name, parameter in named:
        weight = Weight(
            tuple(parameter.shape),
            parameter.element_size(),
            parameter.requires_grad and (at_once is None or name in at_once),
            block_of.get(id(parameter)),
            staged=id(parameter) in staged,
            once_whole=id(parameter) in once,
            once_in_parts=id(parameter) in once_in_parts,
            is_table=id(parameter) in tables,
            is_expert=id(parameter) in experts and parameter.shape[0] == experts[id(parameter)],
            num_written=settings.get(clean_name(name), PLAIN).num_written,
            is_saved=saved is None or name in saved,
            is_mask=parameter.dtype == torch.bool,
            decoded=decoded.get(id(parameter), 0),
            watched=watched.get(id(parameter), 0),
        )
        yield clean_name(name), weight


def _watched(model: nn.Module) -> dict[int, int]:
    """Bytes held to look at a weight's gradient, by the id of a parameter that a stage or an adapter trains by it."""
    found = {}
    for _, layer in branched_layers(model):
        trained = next((p for m in branch_modules(layer) for p in m._parameters.values() if p is not None), None)
        if trained is not None:
            found[id(trained)] = bytes_watched(layer)
    for _, site in iter_sites(model):
        for stage in site.weight_stages():
            trained = next((p for p in stage.parameters() if p.requires_grad), None)
            if trained is not None:
                found[id(trained)] = stage.bytes_watched
    return found


def _with_staging_settled(
    engine: EngineConfig, weights: Sequence[Weight], case: Case, memory_bytes: int
) -> EngineConfig:
    """Return the engine with `staging: auto` replaced by what a rank of so much memory takes."""
    if engine.staging != "auto":
        return engine
    copies = staged_copies(engine, weights, case.world_size, case.recipe.train.precision)
    return engine.model_copy(update={"staging": "per_step" if fits(copies, memory_bytes) else "per_use"})


def _teacher_sizes(recipe: Recipe, to_come: Mapping[str, ModelConfig] | None) -> tuple[int, int]:
    """Elements of the frozen models that techniques read, each once, and those of their blocks; 0 without any."""
    whole = in_blocks = 0
    for path in frozen_paths(recipe):
        teacher = frozen_on_meta(recipe, path, to_come)
        whole += sum(p.numel() for p in teacher.parameters())
        in_blocks += sum(p.numel() for block in decoder_blocks(teacher) for p in block.parameters())
    return whole, in_blocks


def _teacher_bytes(sizes: tuple[int, int], case: Case) -> float:
    """Bytes of the teachers on one rank; whole, but under FSDP and ZeRO-3, which shard their blocks."""
    whole, blocks = sizes
    size = 2 if case.recipe.train.precision == "bf16" else 4
    if isinstance(case.engine, FsdpEngine):
        sharers = case.engine.shard_size or case.world_size
    else:
        is_sharded = isinstance(case.engine, DeepSpeedEngine) and case.engine.stage == 3
        sharers = case.world_size if is_sharded else 1
    return size * (whole - blocks + blocks / sharers)


def _no_loading(path: str) -> nn.Module:
    raise ConfigError(f"planning loads no weights, but a technique asked for {path} at installation")
