"""What another trainer cannot carry: refused when techniques are attached, with what to use instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from leanmill.core.batches import BatchRule
from leanmill.core.branches import has_adapters
from leanmill.core.encoders import is_encoder
from leanmill.core.errors import ConfigError
from leanmill.core.ledger import Ledger
from leanmill.core.names import clean_name
from leanmill.core.rules import StepRule
from leanmill.core.sites import iter_sites
from leanmill.core.technique import InstalledTechniques, TechniqueConfig


OWN = "train it with `leanmill train`"


def check_model(model: Any) -> None:
    """Refuse a model that techniques cannot be put on.

    Raises:
        ConfigError: It is no causal LM, wrapped, sharded or on no device, or has adapters or techniques already.
    """
    if not callable(getattr(model, "get_output_embeddings", None)) or not hasattr(model, "config"):
        raise ConfigError(
            f"attach takes a causal LM of transformers, got {type(model).__name__}; attach before anything wraps the "
            f"model (peft, DDP, accelerate.prepare)"
        )
    if is_encoder(model) or model.get_output_embeddings() is None:
        raise ConfigError(
            f"attach puts the loss of the next token on a model, and {type(model).__name__} predicts none; give an "
            f"AutoModelForCausalLM, or train encoders with `leanmill train` and model.task: masked_lm or embedding"
        )
    if next(iter_sites(model), None) is not None:
        raise ConfigError("this model has techniques attached already; give all of them to one attach")
    if has_adapters(model):
        raise ConfigError("this model has PEFT's adapters; load it without, and attach {type: lora} or {type: peft}")
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise ConfigError(
            "attach before the model leaves the CPU: load it without device_map, which is for reading alone; the "
            "trainer moves it, and FSDP2 or ZeRO-2 share out what is larger than a device"
        )


def check_techniques(configs: Iterable[TechniqueConfig]) -> None:
    """Refuse techniques that a recipe's data or engine has a part in.

    Raises:
        ConfigError: The message says what to use instead.
    """
    for config in configs:
        kind: str = config.type  # type: ignore[attr-defined]
        if config.num_compared():
            raise ConfigError(f"{kind} compares answers, which its own data reader packs side by side; {OWN}")
        if config.changes_what_trains():
            raise ConfigError(f"{kind} trains other parameters in some steps than in others; {OWN}")


def check_installed(installed: InstalledTechniques, ledger: Ledger) -> None:
    """Refuse rules that need to see a step as a whole, or to keep the optimizer from it.

    Raises:
        ConfigError: The message says what to use instead.
    """
    for rule in installed.step_rules:
        if isinstance(rule, BatchRule):
            raise ConfigError(f"{rule.name} changes or scores a step's batches before they are counted; {OWN}")
        if overrides(rule, "replaces_optimizer"):
            raise ConfigError(f"{rule.name} has steps without an optimizer step, which no callback can have; {OWN}")
    if ledger.sees_whole_steps:
        raise ConfigError(
            f"a loss in the model needs all micro-batches of a step before the first one (balance over the global "
            f"batch); give router_balance `scope: micro_batch`, or {OWN}"
        )


def overrides(rule: StepRule, hook: str) -> bool:
    """Whether a rule does something at `hook`."""
    return getattr(type(rule), hook) is not getattr(StepRule, hook)


def writes_gradients(rules: Sequence[StepRule]) -> list[str]:
    """Names of the rules that look at complete gradients before they are clipped, or write them."""
    return [rule.name for rule in rules if overrides(rule, "before_optimizer")]


def check_masters(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse parameters that train in too few bits to take small steps.

    Args:
        model: With its techniques.
        dtypes: Of the plain model's parameters, by name.

    Raises:
        ConfigError: One is in bf16 or fp16.
    """
    for path, parameter in model.named_parameters():
        dtype = dtypes.get(clean_name(path))
        if parameter.requires_grad and dtype in (torch.bfloat16, torch.float16):
            raise ConfigError(
                f"{clean_name(path)} trains in {str(dtype).removeprefix('torch.')}, where small steps are lost; load "
                f"the model with dtype=torch.float32 and let the trainer compute in bf16 (TrainingArguments(bf16=True))"
            )
