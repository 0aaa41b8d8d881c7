"""From a recipe's `model.config` to transformers' configuration object, every setting checked.

transformers checks the types of declared fields and a few sums. What it lets through (unknown keys,
negative sizes, heads that do not divide) would train another model than was meant, or fail with the
words of some tensor operation, hours later on a cluster.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from leanmill.core.encoders import encoder_inputs
from leanmill.core.errors import ConfigError
from leanmill.core.near import near_names
from leanmill.core.secrets import shown
from leanmill.core.technique import ModelTask
from leanmill.models.dropout import SHARE
from leanmill.models.expert_sizes import check_expert_sizes
from leanmill.models.pretrained import one_line, quiet_transformers
from leanmill.models.tasks import auto_class, class_of


_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_UNDECLARED_KEYS = ("head_dim", "partial_rotary_factor", "rope_theta", "rope_scaling", "torch_dtype")
"""Keys that some config classes or their models read although they are no declared fields."""
_AT_LEAST_1 = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts_per_tok",
    "head_dim",
    "max_position_embeddings",
)
"""Sizes of which neither nothing nor less makes a model."""
_MAX_INTEGER = 2**31 - 1
_MAX_LAYERS = 1000
_MAX_TRIED_LAYERS = 200
"""A layer takes some 10 ms."""
_MAX_PARAMETERS = 10**13
_KINDS: dict[ModelTask, str] = {
    "causal_lm": "a causal language model",
    "masked_lm": "an encoder that predicts masked tokens",
    "embedding": "an encoder",
}
_EXAMPLES: dict[ModelTask, list[str]] = {
    "causal_lm": ["llama", "qwen3", "mixtral"],
    "masked_lm": ["bert", "modernbert", "roberta"],
    "embedding": ["bert", "modernbert", "roberta"],
}
_POSITIVE = re.compile(r"(_eps|epsilon|rope_theta|^factor)$")
_WORDS = {"int": "a whole number", "float": "a number with a point, e.g. 1.0", "bool": "true or false", "str": "text"}


def mapped_config(mapping: Mapping[str, Any] | None, vocab_size: int | None, task: ModelTask = "causal_lm") -> Any:
    """Return the `PreTrainedConfig` that `model.config` describes.

    Args:
        mapping: The section, `model_type` included.
        vocab_size: Fills a missing `vocab_size`.
        task: What the model is for. An encoder's padding is token 0 where nothing is said: that of tokenizers trained
            here, and some families count positions from it.

    Raises:
        ConfigError: An unknown key, or a value that no model of this family can have.
    """
    values = copy.deepcopy(dict(mapping or {}))
    config_class = _config_class(values.pop("model_type", None), task)
    _check_keys(values, config_class, "model.config")
    for path, value in _leaves(values, "model.config"):
        _check_value(path, value)
    if vocab_size is not None:
        values.setdefault("vocab_size", vocab_size)
    if task != "causal_lm":
        values.setdefault("pad_token_id", 0)
        unset = [key for key in ("cls_token_id", "sep_token_id") if key in config_class().to_dict()]
        values = {**dict.fromkeys(unset), **values}
    for key in _SPECIAL_TOKENS:
        # A family's default ids belong to its own tokenizer; as padding, they would freeze the
        # embedding row of some unrelated token.
        values.setdefault(key, None)
    _check_sizes(values, config_class.attribute_map)
    given = copy.deepcopy(values)  # transformers writes into nested mappings
    try:
        with quiet_transformers():  # it warns of tokens that are refused below
            hf_config = config_class(**values)
    except Exception as error:
        raise ConfigError(_refusal(error, given)) from error
    _check_built(hf_config)
    return hf_config


def mapping_of(hf_config: Any) -> dict[str, Any]:
    """Return the section `model.config` that describes a model, its special tokens left out."""
    known = _known_keys(type(hf_config)) - set(_SPECIAL_TOKENS)
    values = {key: value for key, value in hf_config.to_diff_dict().items() if key in known}
    return {"model_type": hf_config.model_type, **values}


def check_forward(hf_config: Any, mapping: Mapping[str, Any] | None, task: ModelTask = "causal_lm") -> None:
    """Refuse sizes that do not fit each other: run a few tokens through the model, without storage.

    Not every family can run on the meta device; where its own default sizes cannot either, nothing
    is said.

    Args:
        hf_config: What `mapped_config` returned; left as it is.
        mapping: `model.config`, to name the setting at fault.
        task: What the model is for.

    Raises:
        ConfigError: The family runs on meta, and not with these sizes.
    """
    if hf_config.num_hidden_layers > _MAX_TRIED_LAYERS:
        return
    try:
        _forward_on_meta(copy.deepcopy(hf_config), task)
    except Exception as error:
        if _runs_on_meta(type(hf_config), task):
            raise ConfigError(_refusal(error, mapping or {})) from error


def refuse_build(
    error: Exception, model_type: str, mapping: Mapping[str, Any] | None, task: ModelTask = "causal_lm"
) -> ConfigError:
    """Return the line for what transformers raised while it built the model."""
    if mapping is None:
        return ConfigError(f"model type {model_type!r} cannot be built: {one_line(error)}; choose {_KINDS[task]}")
    return ConfigError(_refusal(error, mapping))


def check_num_parameters(model: Any) -> None:
    """Refuse a model that no cluster holds, which is a mistyped size."""
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > _MAX_PARAMETERS:
        raise ConfigError(
            f"the model would have {count:.2g} parameters, {4 * count / 2**40:,.0f} TiB of weights; correct the sizes "
            f"in model.config"
        )


def _config_class(model_type: Any, task: ModelTask) -> Any:
    from transformers import CONFIG_MAPPING

    import leanmill.models.own_families  # noqa: F401

    known = model_type in CONFIG_MAPPING
    if known and class_of(CONFIG_MAPPING[model_type], task) is not None:
        return CONFIG_MAPPING[model_type]
    names = [name for name in CONFIG_MAPPING if name != model_type]
    near = near_names(str(model_type), names, count=3) or _EXAMPLES[task]
    problem = f"is not {_KINDS[task]} and cannot be built" if known else "is not known to transformers"
    raise ConfigError(
        f"model.config.model_type={shown('model_type', model_type)} {problem}; did you mean {' or '.join(near)}?"
    )


def _known_keys(config_class: Any) -> set[str]:
    return {*config_class().to_dict(), *config_class.attribute_map, *_UNDECLARED_KEYS}


def _check_keys(values: Mapping[str, Any], config_class: Any, path: str) -> None:
    known = _known_keys(config_class)
    for key, value in values.items():
        below = f"{path}.{key}"
        if key not in known:
            near = near_names(key, known, count=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"{below} is no setting of {config_class.model_type!r}; {hint}")
        part = (getattr(config_class, "sub_configs", None) or {}).get(key)
        if isinstance(value, Mapping) and hasattr(part, "model_type"):
            _check_keys({name: item for name, item in value.items() if name != "model_type"}, part, below)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if path.endswith("dtype"):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}.{index}")
    else:
        yield path, value


def _check_value(path: str, value: Any) -> None:
    """Refuse numbers that are wrong whatever the family."""
    key = path.rpartition(".")[2]
    if key == "return_dict" and value is not True:
        raise ConfigError(f"{path}={shown(key, value)} changes what a model returns to the trainer; remove it")
    if key in ("dtype", "torch_dtype") and value is not None and not _is_dtype(value):
        raise ConfigError(f"{path}={shown(key, value)} is no dtype; remove it, since train.precision decides")
    share, positive = SHARE.search(key), _POSITIVE.search(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        if positive or (share and value is not None):
            raise ConfigError(f"{path}={shown(key, value)} is not allowed; give a number")
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}={value} is not allowed; give a finite number")
    if abs(value) > _MAX_INTEGER and isinstance(value, int):
        raise ConfigError(f"{path}={value} is beyond any model; give at most {_MAX_INTEGER}")
    if share and not 0 <= value < 1:
        raise ConfigError(f"{path}={value} is not allowed; give a share from 0 to below 1")
    if positive and value <= 0:
        raise ConfigError(f"{path}={value} is not allowed; give a number above 0")


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


def _check_sizes(values: Mapping[str, Any], attribute_map: Mapping[str, str]) -> None:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        name = attribute_map.get(key, key)
        if name in _AT_LEAST_1 and value < 1:
            raise ConfigError(f"model.config.{key}={value} is no size; give at least 1")
        if name.endswith(("_size", "_dim", "_rank", "_layers", "_heads", "_experts")) and value < 0:
            raise ConfigError(f"model.config.{key}={value} is no size; give at least 0")
        if name == "num_hidden_layers" and value > _MAX_LAYERS:
            raise ConfigError(f"model.config.{key}={value} is beyond any model; give at most {_MAX_LAYERS}")


def _check_built(hf_config: Any) -> None:
    heads, groups = (getattr(hf_config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(groups, int) and groups > 0 and heads % groups:
        fitting = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise ConfigError(
            f"model.config.num_key_value_heads={groups} does not divide num_attention_heads={heads}; "
            f"give one of {', '.join(fitting[:12])}"
        )
    check_expert_sizes(hf_config, "model.config.")
    size = getattr(hf_config, "vocab_size", None)
    for key in _SPECIAL_TOKENS:
        given = getattr(hf_config, key, None)
        for token in given if isinstance(given, list) else [given]:
            if isinstance(size, int) and isinstance(token, int) and not 0 <= token < size:
                raise ConfigError(
                    f"model.config.{key}={token} is no token of vocab_size={size}; remove it or correct it"
                )


def _forward_on_meta(hf_config: Any, task: ModelTask) -> None:
    # Eager attention and batched experts are the two that need no values; the mask is given because
    # making one asks the positions.
    length = 4
    with torch.no_grad(), torch.device("meta"):
        model = auto_class(task).from_config(
            hf_config, dtype=torch.float32, attn_implementation="eager", experts_implementation="batched_mm"
        )
        if task != "causal_lm":
            positions = torch.arange(length)[None]
            model.eval()(**encoder_inputs(model, {"input_ids": torch.zeros_like(positions), "position_ids": positions}))
            return
        model.eval()(
            input_ids=torch.zeros(1, length, dtype=torch.long),
            attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool),
            position_ids=torch.arange(length)[None],
            use_cache=False,
        )


def _runs_on_meta(config_class: Any, task: ModelTask) -> bool:
    try:
        _forward_on_meta(config_class(), task)
    except Exception:
        return False
    return True


def _refusal(error: Exception, values: Mapping[str, Any]) -> str:
    """Say what is wrong with `model.config` in its own words."""
    cause = error.__cause__ or error
    text = one_line(cause.args[0] if isinstance(cause, KeyError) and cause.args else cause)
    wrong_type = re.search(r"Field '(\w+)' (?:expected (\w+), got|with value)", text)
    if wrong_type:
        key, kind = wrong_type.groups()
        allowed = _WORDS.get(kind or "", "a value of another type, as transformers documents it")
        return f"model.config.{key}={shown(key, values.get(key))} is not allowed; give {allowed}"
    if isinstance(cause, KeyError) and cause.args:
        place = next((path for path, value in _leaves(values, "model.config") if value == cause.args[0]), None)
        if place is not None:
            return f"{place}={cause.args[0]!r} is not known to transformers; correct it{_known(place, cause.args[0])}"
    return f"model.config does not make a model: {text.rstrip('.')}; correct the settings this is about"


def _known(place: str, given: str) -> str:
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    names = ROPE_INIT_FUNCTIONS if place.endswith("rope_type") else ACT2FN
    near = near_names(given, names, count=3)
    return f", e.g. {', '.join(near or list(names)[:5])}" if place.endswith(("rope_type", "act", "activation")) else ""
