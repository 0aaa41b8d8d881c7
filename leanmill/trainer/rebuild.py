"""Rebuilding, in one process, the model that a checkpoint was saved from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from leanmill.checkpoint.fingerprint import fingerprint_folder
from leanmill.checkpoint.manifest import read_manifest, verify
from leanmill.checkpoint.phases import where_it_is_now
from leanmill.checkpoint.reading import read_document, read_full_state
from leanmill.core.errors import ConfigError, RunError
from leanmill.core.names import clean_name
from leanmill.core.probes import Probe
from leanmill.core.rules import StepContext, StepRule, load_state
from leanmill.core.technique import InstallContext
from leanmill.models.build import build_on_meta
from leanmill.models.materialise import draw, make_materialiser
from leanmill.models.pretrained import local_folder
from leanmill.parallel.naming import state_buffers, state_parameters
from leanmill.parallel.tensors import assign
from leanmill.recipe.earlier import as_meant
from leanmill.recipe.root import Recipe
from leanmill.recipe.rules import num_steps
from leanmill.trainer.prepare import compact_weights, install_techniques, listed_and_unasked


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """A trained model on the CPU, in eval mode, its sites and adapters in place."""

    model: Any
    recipe: Recipe
    step: int
    versions: dict[str, str]
    """Of the packages that trained it."""
    tokenizer_dir: Path | None
    """The run's tokenizer, where it is still beside the checkpoint."""
    in_bf16: frozenset[str] = frozenset()
    """Parameters that the run kept in bf16, by the plain model's names; here they have those values in fp32."""
    probes: Sequence[Probe] = ()
    """Of its techniques."""


def rebuild(checkpoint_dir: Path) -> Rebuilt:
    """Return the model of a checkpoint with its trained weights, fp32.

    Raises:
        ConfigError: The recipe saved with the checkpoint does not describe its weights.
        RunError: The checkpoint is incomplete or damaged.
    """
    if not checkpoint_dir.is_dir():
        raise ConfigError(f"{checkpoint_dir}: no such folder; give a checkpoint such as runs/NAME/checkpoints/step-...")
    problems = verify(checkpoint_dir)
    if problems:
        raise RunError(f"{checkpoint_dir} is incomplete or damaged: {problems[0]}; name another checkpoint")
    manifest = read_manifest(checkpoint_dir)
    partial = manifest.partial
    recipe = _recipe_of(checkpoint_dir)
    if partial and recipe.model.path is not None:
        _check_base(recipe, manifest.base)
    state = read_document(checkpoint_dir, "train_state.json")
    step = int(state.get("step", 0))
    stored = read_full_state(checkpoint_dir)
    tokenizer_dir = checkpoint_dir.parent.parent / "tokenizer"
    model = _build(recipe, stored, tokenizer_dir)
    steps = int(state.get("num_steps", 0)) or num_steps(recipe)
    return Rebuilt(
        model=model,
        recipe=recipe,
        step=step,
        versions=read_document(checkpoint_dir, "versions.json"),
        tokenizer_dir=tokenizer_dir if tokenizer_dir.is_dir() else None,
        **fill_trained(
            recipe,
            model,
            stored,
            rule_states=state.get("rules", {}),
            step=step,
            num_steps=steps,
            source=str(checkpoint_dir),
            partial=partial,
        ),
    )


class Filled(TypedDict):
    """What is known of a model once it has its trained weights; see `Rebuilt`."""

    in_bf16: frozenset[str]
    probes: Sequence[Probe]


def fill_trained(
    recipe: Recipe,
    model: Any,
    stored: Mapping[str, Tensor],
    *,
    rule_states: Mapping[str, Mapping[str, Any]],
    step: int,
    num_steps: int,
    source: str,
    partial: bool = False,
) -> Filled:
    """Bring a plain model on the meta device to what it was in training: techniques, weights, schedules; eval mode.

    Args:
        recipe: Of the training.
        model: The causal LM.
        stored: Its trained state, by name, whole.
        rule_states: What step rules saved.
        step: Optimizer steps done.
        num_steps: Of the whole run.
        source: Where the state is from, for messages.
        partial: Whether `stored` leaves out what the recipe's own model folder holds.

    Raises:
        ConfigError: The recipe does not describe the state.
    """
    context = InstallContext(load_frozen_model=_no_teacher, vocab_size=model.config.vocab_size, seed=recipe.seed)
    techniques = install_techniques(listed_and_unasked(recipe, model), model, context)
    compact_weights(recipe, model)
    load_state(techniques.step_rules, rule_states)
    if partial:
        make_materialiser(recipe.model, seed=recipe.seed, fill_branches=techniques.fill_branches)(model)
    else:
        draw(model, seed=recipe.seed, fill_branches=techniques.fill_branches)
    kept = {
        name: value
        for name, value in stored.items()
        if not any(technique.is_for_training_only(name) for technique in recipe.techniques)
    }
    _load(model, kept, source, partial)
    _replay_schedules(techniques.step_rules, step, num_steps)
    model.eval()
    return Filled(in_bf16=_widened(model), probes=techniques.probes)


def _recipe_of(checkpoint_dir: Path) -> Recipe:
    recipe = Recipe.model_validate(as_meant(read_document(checkpoint_dir, "recipe.json")))
    if recipe.model.path is None:
        return recipe
    path = where_it_is_now(recipe.model.path, checkpoint_dir)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": path})})


def _check_base(recipe: Recipe, base: str | None) -> None:
    path = str(recipe.model.path)
    if base is not None and fingerprint_folder(local_folder(path, recipe.model.revision)) != base:
        raise ConfigError(
            f"model.path {path} is not the model this checkpoint's adapters were trained on (its files changed); "
            f"put the original back, or set model.revision"
        )


def _build(recipe: Recipe, stored: dict[str, Tensor], tokenizer_dir: Path) -> Any:
    """Build on meta; a vocabulary that came from the tokenizer is read off the stored embedding."""
    vocab_size = None
    if recipe.model.config is not None and "vocab_size" not in recipe.model.config:
        probe = build_on_meta(recipe.model, device_type="cpu")
        table = probe.get_input_embeddings()
        name = next(f"{path}.weight" for path, module in probe.named_modules() if module is table)
        rows = [tensor.shape[0] for key, tensor in stored.items() if clean_name(key) == name]
        vocab_size = rows[0] if rows else _tokenizer_size(tokenizer_dir)
    return build_on_meta(recipe.model, vocab_size=vocab_size, device_type="cpu")


def _tokenizer_size(folder: Path) -> int:
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ConfigError(f"the run's tokenizer is missing at {folder}; keep the checkpoint inside its run folder")
    return len(AutoTokenizer.from_pretrained(str(folder)))


def _load(model: nn.Module, stored: Mapping[str, Tensor], folder: str, partial: bool) -> None:
    live: dict[str, Tensor] = {**dict(state_parameters(model)), **dict(state_buffers(model))}
    unexpected = sorted(stored.keys() - live.keys())
    missing = [] if partial else sorted(live.keys() - stored.keys())
    if unexpected or missing:
        what = f"holds {unexpected[0]}, which" if unexpected else f"lacks {missing[0]}, which"
        has = "lacks" if unexpected else "has"
        raise ConfigError(
            f"{folder} {what} the model of its recipe.json {has} ({len(unexpected)} unknown, {len(missing)} missing); "
            f"export with the leanmill version that wrote it (versions.json)"
        )
    for name, value in stored.items():
        if live[name].shape != value.shape:
            raise ConfigError(
                f"{folder}: {name} has shape {tuple(value.shape)}, its recipe.json describes "
                f"{tuple(live[name].shape)}; the checkpoint belongs to another model"
            )
        assign(live[name], value)


def _widened(model: nn.Module) -> frozenset[str]:
    """Turn bf16 parameters into fp32 ones of the same values, since nothing autocasts here; return their names."""
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    for parameter in found.values():
        parameter.data = parameter.data.float()
    return frozenset(clean_name(name) for name in found)


def _replay_schedules(rules: list[StepRule], step: int, steps: int) -> None:
    """Put scheduled values where they stood in the last step done; they are in no checkpoint."""
    for rule in rules:
        rule.begin_step(
            StepContext(step=max(0, step - 1), num_steps=max(steps, step), num_micro_batches=1, is_replayed=True)
        )


def _no_teacher(path: str) -> nn.Module:
    raise RunError(f"the frozen model {path} is not needed for an export")
