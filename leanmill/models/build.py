"""From a recipe's model section to a causal LM on the meta device, and loading frozen models.

Everything Hugging Face raises on the way becomes one line that says what to type instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.sites import iter_sites
from leanmill.models.config import ModelConfig
from leanmill.models.materialise import make_materialiser


__all__ = [
    "build_on_meta",
    "load_frozen",
    "load_weights",
    "local_folder",
    "make_materialiser",
    "num_active_parameters",
    "num_parameters",
]

_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_UNDECLARED_KEYS = ("head_dim", "partial_rotary_factor", "rope_theta", "rope_scaling", "torch_dtype")
"""Keys that some config classes or their models read although they are no declared fields."""


def build_on_meta(
    config: ModelConfig,
    *,
    vocab_size: int | None = None,
    sequence_length: int | None = None,
    device_type: str | None = None,
    packed: bool = True,
) -> Any:
    """Build the causal LM without storage: fp32 parameters on the meta device, no key-value cache.

    Args:
        config: The recipe's model section.
        vocab_size: Tokens of the run's tokenizer; fills a missing `vocab_size` and is checked
            against a given one.
        sequence_length: Tokens of a row, checked against the model's longest context.
        device_type: Where the run computes, for `attention: auto`; None is cuda where there is one.
        packed: Whether rows hold several documents, for `attention: auto`.

    Returns:
        The `PreTrainedModel`.

    Raises:
        ConfigError: The section cannot be built; the message says what to change.
        RunError: The hub cannot be reached.
    """
    from transformers import AutoModelForCausalLM

    hf_config = _from_checkpoint(config) if config.path is not None else _from_mapping(config.config, vocab_size)
    _check_sizes(hf_config, config, vocab_size, sequence_length)
    hf_config.use_cache = False
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                hf_config,
                dtype=torch.float32,
                attn_implementation=_attention(config, hf_config, device_type, packed),
                trust_remote_code=config.trust_remote_code,
            )
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"model type {hf_config.model_type!r} cannot be built: {_one_line(error)}") from error
    return model.train()


def load_frozen(
    path: str, *, dtype: torch.dtype | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """Load a causal LM for reading only: on the CPU, in eval mode, every parameter frozen.

    Args:
        path: Local folder or hub name; safetensors only.
        dtype: Dtype of the weights; None keeps the stored one.
        revision: Hub revision.
        trust_remote_code: Run Python code that comes with `path`.
    """
    config = ModelConfig(path=path, revision=revision, trust_remote_code=trust_remote_code, attention="sdpa")
    model = load_weights(config, dtype=dtype)
    model.config.use_cache = False
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def load_weights(config: ModelConfig, *, dtype: torch.dtype | None) -> Any:
    """Load `config.path` with transformers' own loader, on the CPU, never unpickling.

    Raises:
        ConfigError: No safetensors weights, keys missing from them, or other shapes.
        RunError: The hub cannot be reached.
    """
    from transformers import AutoModelForCausalLM

    hf_config = _from_checkpoint(config)
    attention = "sdpa" if config.attention == "auto" else config.attention
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(config.path),
                config=hf_config,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                use_safetensors=True,
                dtype="auto" if dtype is None else dtype,
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:
        raise _hub_error(config, error) from error
    model, report = loaded
    _check_report(str(config.path), report)
    return model


def local_folder(path: str, revision: str | None) -> Path:
    """Return the folder a checkpoint's files lie in: the path itself, or a hub model's snapshot."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    from transformers.utils import cached_file

    return Path(str(cached_file(path, "config.json", revision=revision))).parent


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep back transformers' progress bars and tables; what matters in them we say in one line."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (all, trainable) parameters, tied ones once, those of stages and adapters included."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def num_active_parameters(model: nn.Module) -> int:
    """Return the parameters of the plain model that one token passes through.

    Tied weights count once; of stacked experts, top_k of num_experts count; what stages hold does
    not.
    """
    from leanmill.core.experts import is_stacked_experts, stacked_parameters

    staged = {id(p) for _, site in iter_sites(model) for p in site.stages.parameters()}
    total = sum(p.numel() for p in model.parameters() if id(p) not in staged)
    top_k = getattr(model.config, "num_experts_per_tok", None)
    idle = 0
    for module in model.modules():
        if is_stacked_experts(module) and top_k is not None:
            size = sum(getattr(module, name).numel() for name in stacked_parameters(module))
            num_experts = getattr(module, stacked_parameters(module)[0]).shape[0]
            idle += size - size * min(top_k, num_experts) // num_experts
    return total - idle


def _from_mapping(mapping: dict[str, Any] | None, vocab_size: int | None) -> Any:
    from transformers import CONFIG_MAPPING

    values = dict(mapping or {})
    model_type = values.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING.keys()), n=3)
        raise ConfigError(
            f"model.config.model_type is {model_type!r}, which transformers does not know; "
            f"near names: {', '.join(near or ['llama', 'qwen3', 'mixtral'])}"
        )
    config_class = CONFIG_MAPPING[model_type]
    _check_keys(values, config_class)
    if vocab_size is not None:
        values.setdefault("vocab_size", vocab_size)
    for key in _SPECIAL_TOKENS:
        # A family's default ids belong to its own tokenizer; as padding, they would freeze the
        # embedding row of some unrelated token.
        values.setdefault(key, None)
    try:
        return config_class(**values)
    except Exception as error:
        raise ConfigError(f"model.config ({model_type}): {_one_line(error)}") from error


def _check_keys(values: dict[str, Any], config_class: Any) -> None:
    known = {*config_class().to_dict(), *config_class.attribute_map, *_UNDECLARED_KEYS}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"model.config.{key} is no setting of {config_class.model_type!r}; {hint}")


def _from_checkpoint(config: ModelConfig) -> Any:
    from transformers import AutoConfig

    path = str(config.path)
    folder = Path(path).expanduser()
    if folder.is_dir():
        _check_folder(folder)
    elif path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ConfigError(
            f"model.path {path!r} is no folder; give a checkpoint folder or a hub name such as 'org/name'"
        )
    try:
        hf_config = AutoConfig.from_pretrained(
            str(folder) if folder.is_dir() else path,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    except Exception as error:
        raise _hub_error(config, error) from error
    if getattr(hf_config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{path} holds quantised weights, which cannot be trained or distilled here; give the "
            f"unquantised checkpoint it was made from"
        )
    return hf_config


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} holds no config.json, so it is no Hugging Face checkpoint; give the model's folder"
        )
    if any(folder.glob("*.safetensors")):
        return
    pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
    found = f"only {pickled[0]}, which is a pickle and can run code" if pickled else "no weights"
    raise ConfigError(
        f"{folder} holds {found}; Leanmill loads safetensors only: load the checkpoint where you trust it and "
        f"call model.save_pretrained(folder), which writes safetensors"
    )


def _hub_error(config: ModelConfig, error: Exception) -> Exception:
    """Turn what Hugging Face raised for `config.path` into one line."""
    text = _one_line(error)
    name = f"{config.path}" + (f" (revision {config.revision})" if config.revision else "")
    if "trust_remote_code" in text or "custom code" in text:
        return ConfigError(
            f"{name} needs Python code that comes with the checkpoint; read it, then set "
            f"model.trust_remote_code=true, or choose a family that transformers has built in"
        )
    unreachable = ("couldn't connect", "offline mode", "Max retries", "timed out", "Connection")
    if any(word in text for word in unreachable):
        return RunError(
            f"{name} is no local folder and the Hugging Face hub cannot be reached; check the network and run "
            f"again, or download the model and give its folder as model.path"
        )
    if "safetensors" in text:
        return ConfigError(
            f"{name} has no safetensors weights; convert it where you trust it with model.save_pretrained(folder) "
            f"and give that folder"
        )
    return ConfigError(f"model.path {name!r} cannot be loaded: {text}")


def _check_report(path: str, report: dict[str, Any]) -> None:
    """Refuse a checkpoint that does not fill the model."""
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise ConfigError(
            f"{path} lacks {len(missing)} weights of the model its config describes: {_some(missing)}; "
            f"give the complete checkpoint"
        )
    mismatched = [str(item[0]) if isinstance(item, tuple) else str(item) for item in report.get("mismatched_keys", ())]
    if mismatched:
        raise ConfigError(
            f"{path} has other shapes than its config describes for {len(mismatched)} weights: "
            f"{_some(sorted(mismatched))}; give a matching config.json"
        )
    errors = report.get("error_msgs") or report.get("conversion_errors")
    if errors:
        raise ConfigError(f"{path} cannot be converted: {_one_line(errors)}")


def _check_sizes(hf_config: Any, config: ModelConfig, vocab_size: int | None, sequence_length: int | None) -> None:
    if vocab_size is not None and hf_config.vocab_size < vocab_size:
        raise ConfigError(
            f"the model has {hf_config.vocab_size} embeddings and the tokenizer {vocab_size} tokens; set "
            f"model.config.vocab_size to at least {vocab_size}, or data.tokenizer to the model's own tokenizer"
        )
    longest = config.max_context or getattr(hf_config, "max_position_embeddings", None)
    if sequence_length is not None and longest is not None and sequence_length > longest:
        field = "model.max_context" if config.max_context else "max_position_embeddings"
        raise ConfigError(
            f"data.sequence_length={sequence_length} is longer than the model's context, {field}={longest}; "
            f"set data.sequence_length={longest} or less, or raise {field}"
        )


def _attention(config: ModelConfig, hf_config: Any, device_type: str | None, packed: bool) -> str:
    if config.attention != "auto":
        return config.attention
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    return "flex_attention" if device_type == "cuda" and packed and _supports_flex(hf_config) else "sdpa"


def _supports_flex(hf_config: Any) -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(hf_config), None)
    return bool(getattr(model_class, "_supports_flex_attn", False))


def _one_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
