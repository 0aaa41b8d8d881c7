"""Exporting the adapters of a checkpoint as a folder that Hugging Face PEFT loads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leanmill.core.around import own_form
from leanmill.core.branches import (
    branch_modules,
    branched_layers,
    has_factors,
    low_rank_branches,
    stored_names,
    wrapped_parameter,
)
from leanmill.core.compact import coded_weights
from leanmill.core.errors import ConfigError
from leanmill.core.names import clean_name
from leanmill.core.quiet import ignore_warning
from leanmill.core.site import EmbeddingSite, ExpertSite, Site
from leanmill.core.sites import iter_sites
from leanmill.core.stage import Slot, Stage
from leanmill.export.activations import settle_activations
from leanmill.export.compare import allowed, check_same, reload, sample_logits
from leanmill.export.folded import beside_of, left_out, prepare_config
from leanmill.export.folding import detach_adapters, fold_sites, reshaping_stages
from leanmill.export.formats import Activations, Checked, Format
from leanmill.export.wrapped import take_wrapped, write_wrapped
from leanmill.models.pretrained import load_weights, quiet_transformers
from leanmill.trainer.rebuild import Rebuilt


@dataclass(frozen=True)
class _Factors:
    """One adapter: the weight it adds to gains `scaling` x `b` x `a`."""

    a: Tensor
    """[rank, in]; of stacked experts [num_experts x rank, in], one expert after the other."""
    b: Tensor
    """[out, rank]; of stacked experts [out, rank x num_experts], the ranks' experts side by side."""
    scaling: float
    is_embedding: bool
    num_experts: int | None = None
    """Of stacked experts."""

    @property
    def rank(self) -> int:
        return self.a.shape[0] // (self.num_experts or 1)


class AdapterFormat(Format):
    """A PEFT folder: `adapter_config.json` and `adapter_model.safetensors`.

    The adapter belongs to the checkpoint named in `model.path` where the run left that as it was.
    Otherwise (random weights, trained ones, masked or quantised ones) the folded base is written
    beside it as `base/`.
    """

    label: ClassVar[str] = "peft"

    def __init__(self, rebuilt: Rebuilt, out_dir: Path, activations: Activations) -> None:
        if activations != "trained":
            raise ConfigError(
                "--activations float is for whole models: an adapter computes with the base it was trained beside"
            )
        self.rebuilt, self.model = rebuilt, rebuilt.model
        self.wrapped = take_wrapped(self.model)
        self.adapters = {} if self.wrapped is not None else dict(_adapters(self.model))
        settle_activations(self.model, "trained")
        self.expected = sample_logits(self.model)
        self.needs_base = _needs_base(rebuilt)
        path = rebuilt.recipe.model.path
        self.base_name = str((out_dir / "base").resolve()) if self.needs_base else str(path)
        self.left_out = left_out(beside_of(self.model))
        _strip(self.model)

    @classmethod
    def covers(cls, model: Any) -> str | None:
        if next(branched_layers(model), None) is None and next(_adapters(model), None) is None:
            if own_form(model) is not None:
                return "what it trained stands beside the whole model, which PEFT has no form for; type --to hf_code"
            return "it holds no adapter; add `lora` to techniques and train, or export --to hf"
        return None

    def write(self, folder: Path) -> None:
        if self.needs_base:
            prepare_config(self.model, self.rebuilt, folder / "base")
            with quiet_transformers():
                self.model.save_pretrained(folder / "base", safe_serialization=True)
        revision = None if self.needs_base else self.rebuilt.recipe.model.revision
        if self.wrapped is not None:
            self.num_parameters = write_wrapped(folder, self.model, self.wrapped, self.base_name, revision)
        else:
            _write(folder, self.adapters, self.model, self.base_name, revision)
            self.num_parameters = sum(f.a.numel() + f.b.numel() for f in self.adapters.values())

    def check(self, folder: Path) -> Checked:
        from peft import PeftModel

        base = reload(folder / "base") if self.needs_base else _load_base(self.rebuilt)
        # PEFT asks a model for a property by the name it had before.
        ignore_warning("`is_gradient_checkpointing` is deprecated", FutureWarning)
        reloaded = PeftModel.from_pretrained(base, str(folder)).eval()
        difference = check_same(sample_logits(reloaded), self.expected, "the reloaded adapter")
        beside = ", the folded base written beside them" if self.needs_base else ""
        return Checked(
            max_difference=difference,
            tolerance=allowed(self.expected),
            num_parameters=self.num_parameters,
            notes=(
                f"{len(self.adapters if self.wrapped is None else self.wrapped.layers)} adapters on "
                f"{self.base_name}{beside}",
                *self.left_out,
            ),
        )


def _adapters(model: nn.Module) -> Iterator[tuple[str, _Factors]]:
    """Yield (plain name, factors) of every adapter, in either form."""
    for path, layer in branched_layers(model):
        for delta in low_rank_branches(layer) if has_factors(layer) else ():
            yield clean_name(path), _Factors(delta.a, delta.b, delta.scaling, False)
    for name, site in iter_sites(model):
        deltas = [stage for stage in site.weight_stages() if stage.slot is Slot.DELTA]
        if deltas:
            yield name, _from_stages(name, site, deltas)


def _from_stages(name: str, site: Site, stages: Sequence[Stage]) -> _Factors:
    """Join the deltas of one weight into one adapter, whose rank is the sum of theirs."""
    others = [stage.technique for stage in stages if stage.low_rank() is None]
    if others:
        raise ConfigError(f"{name}: {others[0]!r} is no low-rank adapter, so PEFT cannot hold it; export --to hf")
    after = reshaping_stages(site)  # type: ignore[arg-type]
    if after:
        raise ConfigError(
            f"{name}: the adapter lies inside the weight that {' and '.join(after)} reshape, so it means nothing "
            f"beside a base; export --to hf, or train with lora {{where: branch}}"
        )
    deltas = [delta for stage in stages if (delta := stage.low_rank()) is not None]
    scaling = deltas[0].scaling
    a = torch.cat([delta.a for delta in deltas], dim=-2)
    b = torch.cat([delta.b * (delta.scaling / scaling) for delta in deltas], dim=-1)
    if isinstance(site, ExpertSite):
        return _Factors(a.flatten(0, 1), b.permute(1, 2, 0).flatten(1), scaling, False, num_experts=len(a))
    if isinstance(site, EmbeddingSite):  # PEFT keeps the transpose of a table
        return _Factors(b.T.contiguous(), a.T.contiguous(), scaling, True)
    return _Factors(a, b, scaling, False)


def _needs_base(rebuilt: Rebuilt) -> bool:
    """Whether the weights below the adapters are others than `model.path` holds."""
    model = rebuilt.model
    own = {id(p) for _, layer in branched_layers(model) for m in branch_modules(layer) for p in m.parameters()}
    own |= {id(p) for module in model.modules() if isinstance(module, Stage) for p in module.parameters()}
    is_trained = any(p.requires_grad and id(p) not in own for p in model.parameters())
    is_reshaped = any(reshaping_stages(site) for _, site in iter_sites(model))  # type: ignore[arg-type]
    is_changed = any(technique.changes_base() for technique in rebuilt.recipe.techniques)
    is_changed |= next(coded_weights(model), None) is not None
    return rebuilt.recipe.model.path is None or is_trained or is_reshaped or is_changed


def _strip(model: Any) -> None:
    """Leave the folded base: no adapters, no stages."""
    detach_adapters(model)
    for _, site in iter_sites(model):
        site.take_off(Slot.DELTA)
    fold_sites(model)


def _write(folder: Path, adapters: dict[str, _Factors], model: nn.Module, base: str, revision: str | None) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    first = next(iter(adapters.values()))
    ranks = {name: f.rank for name, f in adapters.items() if f.rank != first.rank}
    alphas = {name: f.scaling * f.rank for name, f in adapters.items()}
    alpha = first.scaling * first.rank
    config = LoraConfig(
        r=first.rank,
        lora_alpha=_number(alpha),
        rank_pattern=ranks,
        alpha_pattern={name: _number(value) for name, value in alphas.items() if value != alpha},
        target_modules=_targets(model, {name for name, f in adapters.items() if f.num_experts is None}),
        target_parameters=[name for name, f in adapters.items() if f.num_experts is not None] or None,
        base_model_name_or_path=base,
        revision=revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors: dict[str, Tensor] = {}
    for name, factors in adapters.items():
        path = name if factors.num_experts is None else wrapped_parameter(model, name, adapters)
        a, b = stored_names(path, is_embedding=factors.is_embedding)
        tensors[a], tensors[b] = factors.a.contiguous(), factors.b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def _number(value: float) -> Any:
    return int(value) if float(value).is_integer() else value


def _targets(model: nn.Module, names: set[str]) -> list[str]:
    """Last parts of the names where those select the same layers, else the whole names."""
    leaves = {name.rsplit(".", 1)[-1] for name in names}
    selected = {
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding)) and path.rsplit(".", 1)[-1] in leaves
    }
    return sorted(leaves if selected == names else names)


@torch.no_grad()
def _load_base(rebuilt: Rebuilt) -> Any:
    """Load the base in fp32, some weights with the values that they had in the run, in bf16."""
    base = load_weights(rebuilt.recipe.model, dtype=torch.float32).eval()
    for name, parameter in base.named_parameters():
        if name in rebuilt.in_bf16:
            parameter.copy_(parameter.to(torch.bfloat16))
    return base
