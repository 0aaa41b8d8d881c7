"""The order in which a model becomes trainable, in one function."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from leanmill.checkpoint.fingerprint import fingerprint_folder
from leanmill.core.errors import ConfigError
from leanmill.core.ledger import Ledger
from leanmill.core.losses import AnyLossTerm, EmbeddingLossTerm
from leanmill.core.names import clean_name
from leanmill.core.parameters import PLAIN, ParamRule, apply_trainable, settings_by_name
from leanmill.core.registry import unasked_techniques
from leanmill.core.rules import load_state
from leanmill.core.sites import Sites
from leanmill.core.stage import TechniqueModule, added_parameters
from leanmill.core.technique import Installation, InstallContext, InstalledTechniques, TechniqueConfig
from leanmill.data.tokenizer import other_tokens, tokenizer_fingerprint
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.models.calls import check_sites_are_called
from leanmill.models.compile import compile_blocks
from leanmill.models.config import ModelConfig
from leanmill.models.frozen import compact_frozen, stored_kinds
from leanmill.models.materialise import make_materialiser
from leanmill.models.pretrained import load_frozen, local_folder, pretrained_config
from leanmill.models.sentence_transformers import pooling_of
from leanmill.models.stored_adapter import stored_adapter
from leanmill.models.stored_weights import StoredWeights
from leanmill.models.summary import block_scores
from leanmill.optim.build import build_optimizer
from leanmill.optim.config import OptimizerConfig
from leanmill.parallel.engine import Engine, Preparation
from leanmill.parallel.naming import state_parameters
from leanmill.parallel.precision import resolve_precision
from leanmill.recipe.root import Recipe
from leanmill.trainer.adapter_base import check_base
from leanmill.trainer.embedding_module import EmbeddingModule
from leanmill.trainer.train_module import TrainModule
from leanmill.trainer.turns import Turns


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` leaves behind."""

    techniques: InstalledTechniques
    conversion: str
    """How many weights carry stages."""
    num_trainable: int
    """Parameters that train, at most at once, whole, counted before sharding hides their size."""
    trained: frozenset[str]
    """Names of all parameters of the model that train in some step."""


def prepare(
    recipe: Recipe,
    model: nn.Module,
    engine: Engine,
    *,
    num_micro_batches: int,
    tokenizer: PreTrainedTokenizerFast | None = None,
    data_fingerprint: str | None = None,
    rule_states: Mapping[str, Mapping[str, Any]] | None = None,
    resumes: bool = False,
) -> Prepared:
    """Bring a model on the meta device to trainable: sites, techniques, recompute, compile, shard, fill.

    Args:
        recipe: The validated recipe.
        model: Causal LM on the meta device.
        engine: The engine, not yet prepared; afterwards it owns the module and the optimizer.
        num_micro_batches: Backward passes of a step on this rank.
        tokenizer: The run's, for techniques that compare vocabularies.
        data_fingerprint: Digest of the data, for techniques that keep something a row.
        rule_states: What step rules saved in the checkpoint that a resumed run goes on from.
        resumes: Whether a checkpoint of this run will be loaded.
    """
    context, stored = _context(recipe, model, engine, tokenizer, data_fingerprint)
    if not resumes:
        context = replace(context, check_base=partial(check_base, recipe.model))
    techniques, module = assemble(recipe, model, context)
    load_state(techniques.step_rules, rule_states or {})
    conversion = Sites(model).report() if recipe.techniques else "no techniques: every weight stays plain"
    conversion += f"; {techniques.frozen_weights}" if techniques.frozen_weights else ""
    if recipe.train.compile:
        compile_blocks(model)
    ever = {name: p.numel() for name, p in state_parameters(model) if p.requires_grad}
    turns = None if techniques.trainable_schedule is None else Turns(techniques.trainable_schedule, model)
    engine.prepare(
        module,
        Preparation(
            materialise=make_materialiser(
                recipe.model,
                seed=recipe.seed,
                reset_branches=techniques.reset_branch,
                fill_branches=techniques.fill_branches,
            ),
            make_optimizer=lambda live: optimizer_for(recipe.optimizer, live.model, techniques.param_rules),  # type: ignore[arg-type]
            num_micro_batches=num_micro_batches,
            max_grad_norm=recipe.train.max_grad_norm,
        ),
    )
    for path in {path for technique in recipe.techniques for path in technique.read_models().values()}:
        stored(path).close()
    if turns is not None:
        turns.engine = engine
        techniques.step_rules.insert(0, turns)  # others may look at what trains
    at_once = ever if turns is None else turns.heaviest()
    return Prepared(
        techniques=techniques,
        conversion=conversion,
        num_trainable=sum(ever[name] for name in at_once),
        trained=frozenset(ever),
    )


def _context(
    recipe: Recipe,
    model: nn.Module,
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast | None,
    data_fingerprint: str | None,
) -> tuple[InstallContext, Callable[[str], StoredWeights]]:
    """Return what techniques are offered, and where the weights of a stored model that they read are."""

    @cache  # terms may share a teacher
    def load_frozen_model(path: str) -> nn.Module:
        return engine.prepare_frozen(
            load_frozen(path, trust_remote_code=recipe.model.trust_remote_code, task=recipe.model.task)
        )

    @cache  # each weight of it is read once
    def stored(path: str) -> StoredWeights:
        return StoredWeights(_beside(recipe, path))

    offered = InstallContext(
        load_frozen_model=load_frozen_model,
        vocab_size=model.config.vocab_size,  # type: ignore[union-attr, arg-type]
        tokenizer_fingerprint=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        other_tokens=None
        if tokenizer is None
        else partial(other_tokens, tokenizer, for_encoder=recipe.model.task != "causal_lm"),
        num_tokens=None if tokenizer is None else len(tokenizer),
        end_of_text=None if tokenizer is None else tokenizer.eos_token_id,
        data_fingerprint=data_fingerprint,
        fingerprint_of_model=_fingerprint_of_model,
        seed=recipe.seed,
        cross_entropy_weight=recipe.train.cross_entropy_weight,
        pooling=pooling_of(recipe.model),
        pooling_of=lambda path, kind: pooling_of(_beside(recipe, path, kind)),
        frozen_config=lambda path: pretrained_config(_beside(recipe, path)),
        open_weights=lambda path: stored(path).take,
        stored_adapter=partial(stored_adapter, recipe.model),
        block_scores=partial(block_scores, recipe.model),
    )
    return offered, stored


def _beside(recipe: Recipe, path: str, pooling: Literal["auto", "mean", "cls"] = "auto") -> ModelConfig:
    """Return the model section of a model beside a recipe's own, which is for the same."""
    own = recipe.model
    return ModelConfig(path=path, trust_remote_code=own.trust_remote_code, task=own.task, pooling=pooling)


def _fingerprint_of_model(path: str) -> str | None:
    """Digest of the safetensors files of a model; None for one that is a run's."""
    folder = local_folder(path, None)
    return fingerprint_folder(folder) if any(folder.glob("*.safetensors")) else None


def optimizer_for(config: OptimizerConfig, model: nn.Module, rules: Sequence[ParamRule]) -> torch.optim.Optimizer:
    """Build the optimizer of a model's trainable parameters, each treated as the techniques' rules say."""
    named = trainable(model)
    settings = settings_by_name(rules, [clean_name(name) for name, _ in named])
    return build_optimizer(
        config,
        named,
        undecayed=undecayed(model),
        settings=lambda name: settings.get(clean_name(name), PLAIN),
    )


def assemble(recipe: Recipe, model: nn.Module, context: InstallContext) -> tuple[InstalledTechniques, nn.Module]:
    """Give a model on the meta device its techniques, losses and recomputation: all that needs no engine."""
    techniques = install_techniques(listed_and_unasked(recipe, model), model, context)
    check_sites_are_called(model)
    techniques.frozen_weights = compact_weights(recipe, model)
    module = train_module(recipe, model, techniques.loss_terms, context.ledger)
    apply_activation_checkpointing(
        model,
        recipe.train.activation_checkpointing,
        keeps_received=recipe.layout.tokens_travel and not recipe.layout.expert_resend,
    )
    return techniques, module


def train_module(
    recipe: Recipe, model: nn.Module, terms: Sequence[AnyLossTerm] = (), ledger: Ledger | None = None
) -> nn.Module:
    """Return the model with its losses: those of what it is for (`model.task`), and those of techniques."""
    if recipe.model.task == "embedding":
        of_vectors = [term for term in terms if isinstance(term, EmbeddingLossTerm)]
        return EmbeddingModule(model, pooling_of(recipe.model), of_vectors, ledger=ledger)
    of_tokens = [term for term in terms if not isinstance(term, EmbeddingLossTerm)]
    train = recipe.train
    return TrainModule(model, of_tokens, train.cross_entropy_weight, train.logits_chunk_tokens, ledger=ledger)


def compact_weights(recipe: Recipe, model: nn.Module) -> str:
    """Keep what does not train as `model.frozen_dtype` says; return a line for the log, "" where nothing changes."""
    # A run has settled its precision by now; before, nothing that `auto` keeps in bf16 could be refused.
    return compact_frozen(
        model,
        recipe.model.frozen_dtype,
        "bf16" if recipe.train.precision == "bf16" else "fp32",
        bases_are_read=any(technique.reads_base() for technique in recipe.techniques),
        kinds=stored_kinds(recipe.model),
    )


def with_precision(recipe: Recipe, device_type: str) -> Recipe:
    """Return the recipe with `train.precision: auto` replaced by what suits `device_type`."""
    precision = resolve_precision(recipe.train.precision, device_type)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})


def listed_and_unasked(recipe: Recipe, model: nn.Module) -> list[TechniqueConfig]:
    """Return the techniques of the recipe, and those that look at a model unasked where there is something to see."""
    listed = {technique.type for technique in recipe.techniques}  # type: ignore[attr-defined]
    unasked = unasked_techniques() if recipe.log.watch else []
    found = [one for one in unasked if one.type not in listed and one.watches(model)]  # type: ignore[attr-defined]
    return [*recipe.techniques, *found]


def install_techniques(
    configs: list[TechniqueConfig], model: nn.Module, context: InstallContext
) -> InstalledTechniques:
    """Install every technique on `model`.

    The result does not depend on the listed order, but that several of one type keep theirs.
    """
    installed = InstalledTechniques()
    sites = Sites(model)
    keeping: list[Callable[[nn.Module], None]] = []
    branches: list[tuple[TechniqueConfig, Callable[[nn.Module], None]]] = []
    for config in sorted(configs, key=lambda c: c.type):  # type: ignore[attr-defined]
        with _own_parameters(config, model, installed.param_rules):
            part = config.install(sites, context)
        _add(installed, part)
        if part.keep is not None:
            keeping.append(part.keep)
        if part.add_branches is not None:
            branches.append((config, part.add_branches))
            installed.reset_branch, installed.fill_branches = part.reset_branch, part.fill_branches
    installed.step_rules.extend(context.shared_rules())
    base = {id(parameter) for parameter in _base_parameters(model)}
    for config, add_branches in branches:
        with _own_parameters(config, model, installed.param_rules):
            add_branches(model)
    named = [(clean_name(path), parameter) for path, parameter in model.named_parameters()]
    apply_trainable(installed.param_rules, named, base if installed.freeze_base else ())
    settings_by_name(installed.param_rules, [name for name, _ in named])  # raises where rules differ
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("the techniques leave nothing to train; remove one that freezes, or give `lora` targets")
    for rule in installed.step_rules:
        rule.check()
    for keep in keeping:
        keep(model)
    return installed


def _add(installed: InstalledTechniques, part: Installation) -> None:
    installed.loss_terms.extend(part.loss_terms)
    installed.step_rules.extend(part.step_rules)
    installed.probes.extend(part.probes)
    installed.param_rules.extend(part.param_rules)
    installed.freeze_base |= part.freeze_base
    if part.trainable_schedule is not None:
        first, second = installed.trainable_schedule, part.trainable_schedule
        if first is not None:
            raise ConfigError(
                f"{first.technique} and {second.technique} both choose which parameters train in a step; keep one"
            )
        installed.trainable_schedule = second


@contextmanager
def _own_parameters(config: TechniqueConfig, model: nn.Module, rules: list[ParamRule]) -> Iterator[None]:
    """Give the parameters that come up inside the context the settings of the technique's own."""
    settings = config.own_settings()
    before = {id(parameter) for parameter in model.parameters()}
    yield
    if settings != PLAIN:
        names = {clean_name(path) for path, p in model.named_parameters() if id(p) not in before}
        kind: str = config.type  # type: ignore[attr-defined]
        rules.append(ParamRule(technique=kind, match=names.__contains__, settings=settings))


def _base_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the plain model: all but those that techniques added."""
    added = {id(p) for p in added_parameters(model)}
    return [p for p in model.parameters() if id(p) not in added]


def undecayed(module: nn.Module) -> set[int]:
    """Ids of added parameters that get no weight decay: all but those their module says are decayed."""
    found: set[int] = set()
    for added in module.modules():
        if isinstance(added, TechniqueModule):
            found |= {id(p) for name, p in added.named_parameters() if not added.decays(name)}
    return found


def trainable(model: nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Named trainable parameters of a model, tied ones once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
