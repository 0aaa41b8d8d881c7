"""Low-rank output branches beside linear sites, wrapped by Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from leanmill.core.branches import is_branched
from leanmill.core.errors import ConfigError
from leanmill.core.site import ExpertSite, LinearSite, Site
from leanmill.core.technique import Installation


def branches(
    selected: Sequence[Site], *, init: Literal["kaiming", "gaussian"], options: Mapping[str, Any]
) -> Installation:
    """Return an installation that wraps the selected sites once all stages are in place.

    Args:
        selected: Sites to wrap.
        init: How A starts.
        options: Further arguments of PEFT's `LoraConfig`.

    Raises:
        ConfigError: A selected site is not a linear layer.
    """
    others = [site for site in selected if not isinstance(site, LinearSite)]
    if others:
        name = others[0].site_name
        pattern = f"{name.split('.')[-2]}.*" if isinstance(others[0], ExpertSite) else name
        raise ConfigError(
            f"lora with where: branch wraps linear layers only, and {name} ({len(others)} of {len(selected)} targets) "
            f"is not one; add {pattern!r} to lora.exclude, or use where: weight"
        )
    peft_init: bool | str = True if init == "kaiming" else init

    def add_branches(model: nn.Module) -> None:
        _inject(model, {**options, "init_lora_weights": peft_init}, [site.site_name for site in selected])

    def reset_branch(layer: Any) -> None:
        for adapter in layer.lora_A:
            layer.reset_lora_parameters(adapter, peft_init)

    return Installation(freeze_base=True, add_branches=add_branches, reset_branch=reset_branch)


def _inject(model: nn.Module, options: Mapping[str, Any], names: list[str]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    if any(is_branched(module) for module in model.modules()):
        raise ConfigError(
            "two techniques wrap layers with output branches, and PEFT would let the second replace the first; "
            "keep one lora with where: branch, and give the other where: weight"
        )
    trainable = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    peft_config = LoraConfig(**options, target_modules=names, task_type="CAUSAL_LM")
    inject_adapter_in_model(peft_config, model)
    # PEFT freezes all but its own parameters, those of stages included. What freezes is the
    # trainer's business: the base does (`freeze_base`), stages do not.
    for parameter in model.parameters():
        parameter.requires_grad_(trainable.get(id(parameter), True))
