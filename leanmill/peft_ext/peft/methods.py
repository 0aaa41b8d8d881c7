"""Which of PEFT's methods train here and what each needs, and why the others do not. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Method:
    """What has to be known of a method that its own code does not say."""

    wraps: Literal["linear", "norm", "embedding"] = "linear"
    """The layers it wraps."""
    reads_weight: bool = False
    """Whether its forward computes from the wrapped layer's weight, and not only from its output."""
    starts_from_weight: bool = False
    """Whether its start, or what it keeps fixed, depends on the wrapped layer's values."""
    routes_tokens: bool = False
    """Whether its adapters choose experts by the token, whose loads are to be balanced."""
    moves_ranks: bool = False
    """Whether it uses other ranks of its adapters as training goes on."""


METHODS: dict[str, Method] = {
    "beft": Method(),
    "boft": Method(),
    "bottleneck": Method(),
    "c3a": Method(),
    "core_lora": Method(starts_from_weight=True),
    "deft": Method(starts_from_weight=True),
    "delora": Method(starts_from_weight=True),
    "fourierft": Method(),
    "glora": Method(reads_weight=True),
    "gralora": Method(),
    "hira": Method(reads_weight=True),
    "hra": Method(reads_weight=True),
    "ia3": Method(),
    "lily": Method(),
    "ln_tuning": Method(wraps="norm", starts_from_weight=True),
    "loha": Method(),
    "lokr": Method(),
    "lora": Method(),
    "miss": Method(),
    "moe_lora": Method(routes_tokens=True),
    "mos": Method(),
    "nola": Method(),
    "oft": Method(),
    "peanut": Method(reads_weight=True),
    "psoft": Method(starts_from_weight=True),
    "pvera": Method(),
    "randlora": Method(),
    "rank_lora": Method(moves_ranks=True),
    "road": Method(),
    "shira": Method(reads_weight=True),
    "supertuning": Method(reads_weight=True, starts_from_weight=True),
    "tinylora": Method(starts_from_weight=True),
    "trainable_tokens": Method(wraps="embedding", reads_weight=True, starts_from_weight=True),
    "unilora": Method(),
    "vblora": Method(),
    "vera": Method(),
    "waveft": Method(),
}

_PROMPTS = (
    "it puts virtual tokens before each row, and rows here are packed documents whose every position is a token of "
    "the data; use lora, or ia3 for as few parameters"
)
REFUSED: dict[str, str] = {
    "adalora": "its ranks are moved by a call of PEFT's own training loop, from whole gradients; use rank_lora",
    "adamss": "the shapes of its factors come from clustering the loaded weights, which are not there when a model is "
    "sharded; use psoft or tinylora, which start from singular vectors too",
    "adaption_prompt": "it takes the place of whole attention layers, and of LLaMA's and GPT-2's only; use lora",
    "cartridge": _PROMPTS,
    "cpt": _PROMPTS,
    "frod": "it decomposes all weights of a kind together before training, and a model is sharded before it is loaded; "
    "use vera or randlora, which share projections too",
    "multitask_prompt_tuning": _PROMPTS,
    "osf": "it projects gradients in hooks on its parameters, which a sharding engine replaces; use psoft",
    "p_tuning": _PROMPTS,
    "poly": "each row must name its task, and rows here hold documents of any; use lora",
    "prefix_tuning": _PROMPTS,
    "prompt_tuning": _PROMPTS,
    "shadow": "it runs a second model beside the decoder and wraps the model's own forward; use lora",
    "xlora": "it mixes adapters that are trained already and runs the model twice a step; use lora",
}
"""PEFT's other methods: why they do not train here, and what to type."""

NOT_OPTIONS: dict[str, str] = {
    "target_modules": "give peft.targets, patterns of names such as 'q_proj' or 'layers.0.*'",
    "exclude_modules": "give peft.exclude, patterns of names",
    "layers_to_transform": "give peft.targets with layers in the patterns, such as 'layers.0.*'",
    "layers_pattern": "give peft.targets with layers in the patterns, such as 'layers.0.*'",
    "target_parameters": "stacked experts take `type: lora` (where: weight), which trains the same sum",
    "modules_to_save": "an adapter run trains adapters alone; leave it out",
    "bias": "an adapter run trains adapters alone; use `type: perp` (components: bias) to train biases",
    "fan_in_fan_out": "PEFT sees it by the layer's class; leave it out",
}
"""Fields of PEFT's configurations that a recipe says in other words, and in which."""

_OTHER_LOOP = "it needs code of PEFT's around the training loop; leave it out"
REFUSED_OPTIONS: dict[str, dict[str, str]] = {
    "lora": {
        "alora_invocation_tokens": _OTHER_LOOP,
        "arrow_config": "it mixes adapters that are trained already; leave it out",
        "corda_config": "its start needs activations of data; use init_lora_weights: pissa",
        "ensure_weight_tying": "tied weights take no adapter of their own; leave it out",
        "eva_config": "its start needs activations of data; use init_lora_weights: pissa",
        "kasa_config": _OTHER_LOOP,
        "layer_replication": "it changes the number of layers; set model.config instead",
        "loftq_config": "the base here stays as it is loaded; use init_lora_weights: pissa",
        "lora_ga_config": "its start needs gradients of data; use init_lora_weights: pissa",
        "megatron_config": "layers here are not Megatron's; leave it out",
        "megatron_core": "layers here are not Megatron's; leave it out",
        "monteclora_config": _OTHER_LOOP,
        "qalora_group_size": "it is for GPTQ bases; leave it out",
        "runtime_config": _OTHER_LOOP,
        "trainable_token_indices": "use method: trainable_tokens",
        "use_bdlora": "it is for tensor-parallel serving; leave it out",
        "use_qalora": "it is for GPTQ bases; leave it out",
        "velora_config": _OTHER_LOOP,
    },
}
"""Options of methods that train here which do not, and why."""

CHANGES_BASE = ("pissa", "olora")
"""Starts of LoRA that move part of the weight into the adapter, by how they begin."""
STARTS = ("gaussian", "orthogonal", *CHANGES_BASE)
"""Starts of LoRA by name."""
