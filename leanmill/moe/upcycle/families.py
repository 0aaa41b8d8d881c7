"""Which mixture of transformers has the attention, norms and embeddings of which dense family.

Read in transformers' modelling code: same modules under the same names, rotary embeddings and biases alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from leanmill.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What of the new MLPs goes into a configuration."""

    num_experts: int
    top_k: int
    normalised: bool
    expert_size: int
    shared_size: int | None
    first_dense_layers: int
    moe_every: int

    @property
    def has_dense_layers(self) -> bool:
        """Whether some layer stays as it is."""
        return self.first_dense_layers > 0 or self.moe_every > 1

    def is_dense(self, layer: int) -> bool:
        """Whether the layer, from 0, stays as it is."""
        return layer < self.first_dense_layers or (layer + 1) % self.moe_every != 0


_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "tie_word_embeddings", "rope_parameters", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
    "dtype",
)  # fmt: skip
_TARGETS = {
    "llama": ("mixtral", "qwen2_moe"),
    "mistral": ("mixtral", "qwen2_moe"),
    "qwen2": ("qwen2_moe",),
    "qwen3": ("qwen3_moe",),
    "olmo2": ("flex_olmo",),
}


def mixture_of(before: Any, sizes: Sizes) -> Any:
    """Return the configuration of the mixture that a dense model becomes.

    Args:
        before: transformers' configuration of the dense model.
        sizes: Of the new MLPs.

    Raises:
        ConfigError: transformers has no mixture with this model's attention, or none with these MLPs.
    """
    family = before.model_type
    if family not in _TARGETS:
        raise ConfigError(
            f"upcycle: transformers has no mixture of experts with the attention and norms of {family!r}; give a model "
            f"of {', '.join(_TARGETS)}"
        )
    _check_biases(before)
    target = _target(family, sizes)
    values = {key: getattr(before, key) for key in _KEPT if hasattr(before, key)}
    values |= {"num_experts_per_tok": sizes.top_k, **_sliding(before, target), **_mlp_values(target, sizes)}
    if target in ("qwen3_moe", "flex_olmo"):
        values["attention_bias"] = before.attention_bias
    if target == "qwen2_moe":
        values["qkv_bias"] = family == "qwen2"
    return _built(target, values)


def _target(family: str, sizes: Sizes) -> str:
    """The first of a family's mixtures that can have the MLPs."""
    reasons = []
    for target in _TARGETS[family]:
        reason = _lacks(target, sizes)
        if reason is None:
            return target
        reasons.append(f"{target} {reason}")
    raise ConfigError(f"upcycle: {'; '.join(reasons)}")


def _lacks(target: str, sizes: Sizes) -> str | None:
    if target in ("mixtral", "flex_olmo") and sizes.has_dense_layers:
        return "has no dense layers: remove first_dense_layers and moe_every"
    if target == "mixtral" and not sizes.normalised:
        return "always normalises the weights of chosen experts: remove normalised"
    if target == "qwen2_moe" and sizes.shared_size is None:
        return "has a shared expert in every sparse layer: type e.g. shared_intermediate_size"
    if target != "qwen2_moe" and sizes.shared_size is not None:
        return "has no shared expert: remove shared_intermediate_size"
    return None


def _mlp_values(target: str, sizes: Sizes) -> dict[str, Any]:
    if target == "mixtral":
        return {"num_local_experts": sizes.num_experts, "intermediate_size": sizes.expert_size}
    values = {"num_experts": sizes.num_experts, "norm_topk_prob": sizes.normalised}
    if target == "flex_olmo":
        return {**values, "intermediate_size": sizes.expert_size}
    if sizes.shared_size is not None:
        values["shared_expert_intermediate_size"] = sizes.shared_size
    return {
        **values,
        "moe_intermediate_size": sizes.expert_size,
        "mlp_only_layers": list(range(sizes.first_dense_layers)),
        "decoder_sparse_step": sizes.moe_every,
    }


def _sliding(before: Any, target: str) -> dict[str, Any]:
    """The settings of windows, where a layer has one."""
    window = getattr(before, "sliding_window", None)
    kinds = list(getattr(before, "layer_types", None) or [])
    if not kinds:
        kinds = ["sliding_attention" if window else "full_attention"] * before.num_hidden_layers
    if not window or "sliding_attention" not in kinds:
        return {"layer_types": kinds} if target == "qwen2_moe" else {}
    if target == "qwen2_moe":
        return {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds}
    if len(set(kinds)) > 1:
        raise ConfigError(
            f"upcycle: {target} has one kind of attention in all layers, this model a window in some only"
        )
    return {"sliding_window": window} | ({"use_sliding_window": True} if target == "qwen3_moe" else {})


def _check_biases(before: Any) -> None:
    """Refuse biases that no mixture has."""
    bad = [key for key in ("mlp_bias", "attention_bias") if getattr(before, key, False)]
    if "attention_bias" in bad and before.model_type not in ("llama", "mistral"):
        bad.remove("attention_bias")
    if bad:
        raise ConfigError(
            f"upcycle: the model has {bad[0]}, and no mixture of transformers with this attention has; give one without"
        )


def _built(model_type: str, values: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = CONFIG_MAPPING[model_type](**values)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    return config
