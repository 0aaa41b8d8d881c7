"""Models that exist already: reading their config and weights through transformers, for training or frozen.

Everything Hugging Face raises on the way becomes one line that says what to type instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.paths import expand_user
from leanmill.core.technique import ModelTask
from leanmill.core.transposed import as_linears
from leanmill.models.config import ModelConfig
from leanmill.models.document_attention import NAME, has_document_attention, plain_attention, register
from leanmill.models.expert_sizes import check_expert_sizes
from leanmill.models.offloading import Held
from leanmill.models.tasks import auto_class, class_of, options_of


def load_frozen(
    path: str,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    task: ModelTask = "causal_lm",
    held: Held | None = None,
) -> nn.Module:
    """Load a model for reading only: on the CPU, in eval mode, every parameter frozen.

    Args:
        path: Local folder or hub name; safetensors only.
        dtype: Dtype of the weights; None keeps the stored one.
        revision: Hub revision.
        trust_remote_code: Run Python code that comes with `path`.
        task: What the model is for.
        held: How much of its weights is held, and where it runs; None holds all on the CPU.
    """
    config = ModelConfig(path=path, revision=revision, trust_remote_code=trust_remote_code, task=task)
    model = load_weights(config, dtype=dtype, held=held, packed=not torch.cuda.is_available())
    model.config.use_cache = False
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def load_weights(
    config: ModelConfig, *, dtype: torch.dtype | None, held: Held | None = None, packed: bool = False
) -> Any:
    """Load `config.path` with transformers' own loader, on the CPU, never unpickling; every layer's weight [out, in].

    Args:
        config: With a `path`.
        dtype: Dtype of the weights; None keeps the stored one.
        held: How much is held, and where; layers are then as the family has them.
        packed: Whether it will read packed rows on the CPU, for `attention: auto`.

    Raises:
        ConfigError: No safetensors weights, keys missing from them, or other shapes.
        RunError: The hub cannot be reached.
    """
    hf_config = pretrained_config(config)
    model_class, attention = class_of(type(hf_config), config.task), str(config.attention)
    if attention == "auto":
        by_document = packed and config.task == "causal_lm" and has_document_attention(model_class)
        attention = NAME if by_document else plain_attention(model_class)
    register()
    try:
        with quiet_transformers():
            loaded: Any = auto_class(config.task).from_pretrained(
                str(config.path),
                config=hf_config,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                use_safetensors=True,
                dtype="auto" if dtype is None else dtype,
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options_of(hf_config, config.task),
                **({} if held is None else held.options()),
            )
    except ConfigError:
        raise
    except Exception as error:
        raise _hub_error(config, error) from error
    model, report = loaded
    _check_report(str(config.path), report)
    return as_linears(model) if held is None else model


def local_folder(path: str, revision: str | None) -> Path:
    """Return the folder a checkpoint's files lie in: the path itself, or a hub model's snapshot."""
    folder = expand_user(path)
    if folder.is_dir():
        return folder
    from transformers.utils import cached_file

    return Path(str(cached_file(path, "config.json", revision=revision))).parent


def weights_folder(config: ModelConfig, *, downloads: bool) -> tuple[Path, Any] | None:
    """Return the folder with the weights of `config.path`, and its transformers config.

    Args:
        config: With a `path`.
        downloads: Whether a model of the hub is fetched; else None stands for one that is not here.

    Raises:
        ConfigError: It is no checkpoint that can be loaded.
        RunError: The hub cannot be reached.
    """
    folder = expand_user(str(config.path))
    if folder.is_dir():
        return folder, pretrained_config(config)
    from huggingface_hub import snapshot_download

    wanted: dict[str, Any] = {
        "revision": config.revision,
        "allow_patterns": ["model*.safetensors", "model.safetensors.index.json"],
    }
    try:
        hf_config = pretrained_config(config)
        return Path(snapshot_download(str(config.path), local_files_only=not downloads, **wanted)), hf_config
    except Exception as error:
        if not downloads:
            return None
        raise _hub_error(config, error) if not isinstance(error, ConfigError | RunError) else error from error


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


def pretrained_config(config: ModelConfig) -> Any:
    """Return the transformers config of `config.path`.

    Raises:
        ConfigError: It is no checkpoint, holds pickles only, is quantised or needs code of its own.
        RunError: The hub cannot be reached.
    """
    from transformers import AutoConfig

    import leanmill.models.own_families  # noqa: F401

    path = str(config.path)
    folder = expand_user(path)
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
    check_expert_sizes(hf_config, f"{path}/config.json: ")
    if getattr(hf_config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{path} holds quantised weights, which cannot be trained or distilled here; give the "
            f"unquantised checkpoint it was made from"
        )
    return hf_config


def _check_folder(folder: Path) -> None:
    if (folder / "checkpoints").is_dir() or (folder / "manifest.json").is_file() or (folder / "phases").is_dir():
        raise ConfigError(
            f"{folder} is a run, whose checkpoints are no model folder; type leanmill export --checkpoint {folder} "
            f"--to hf --out DIR, and give DIR"
        )
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
    text = one_line(error)
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
            f"again, or download the model and give its folder in place of the name"
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
        raise ConfigError(incomplete(path, missing))
    mismatched = [str(item[0]) if isinstance(item, tuple) else str(item) for item in report.get("mismatched_keys", ())]
    if mismatched:
        raise ConfigError(
            f"{path} has other shapes than its config describes for {len(mismatched)} weights: "
            f"{_some(sorted(mismatched))}; give a matching config.json"
        )
    errors = report.get("error_msgs") or report.get("conversion_errors")
    if errors:
        raise ConfigError(f"{path} cannot be converted: {one_line(errors)}")


def incomplete(path: str, missing: list[str]) -> str:
    """Say that a checkpoint lacks weights."""
    return (
        f"{path} lacks {len(missing)} weights of the model its config describes: {_some(missing)}; give the complete "
        f"checkpoint"
    )


def one_line(error: object) -> str:
    """Return what an exception of Hugging Face says, in one line of at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
