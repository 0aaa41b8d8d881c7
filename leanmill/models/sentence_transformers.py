"""The layout in which sentence-transformers keeps what makes a vector of hidden states, read and written without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.core.paths import expand_user
from leanmill.core.pooling import Pooling
from leanmill.models.config import ModelConfig


_MODULES = "modules.json"
_PREFIX = "sentence_transformers.models."
_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def pooling_of(config: ModelConfig) -> Pooling:
    """Return how a model section makes vectors: as it says, else as its `path` was trained, else by the mean.

    Raises:
        ConfigError: `path` was trained with a pooling that is not known here.
    """
    if config.task != "embedding":
        return Pooling()
    is_open = config.pooling == "auto" or config.normalise is None
    stored = _stored(config) if config.path is not None and is_open else Pooling()
    kind = stored.kind if config.pooling == "auto" else config.pooling
    return Pooling(kind, stored.normalise if config.normalise is None else config.normalise)


def write_layout(folder: Path, pooling: Pooling, *, width: int, longest: int) -> None:
    """Write beside an exported model what lets sentence-transformers load the folder.

    Args:
        folder: With the model's own files.
        pooling: How its vectors are made.
        width: Of a vector.
        longest: Tokens of a text.
    """
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = modules if pooling.normalise else modules[:2]
    _write(
        folder / _MODULES,
        [
            {"idx": index, "name": str(index), "path": path, "type": f"{_PREFIX}{kind}"}
            for index, (path, kind) in enumerate(modules)
        ],
    )
    modes = {key: kind == pooling.kind for key, kind in _MODES.items()}
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes})
    _write(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})
    if pooling.normalise:
        (folder / "2_Normalize").mkdir()


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _stored(config: ModelConfig) -> Pooling:
    modules = _read(config, _MODULES)
    if modules is None:
        return Pooling()
    kinds = {str(one["type"]).rpartition(".")[2]: one["path"] for one in modules}
    unknown = sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"})
    modes = _read(config, f"{kinds.get('Pooling', '1_Pooling')}/config.json") or {}
    chosen = [key for key, value in modes.items() if key.startswith("pooling_mode_") and value is True]
    if unknown or len(chosen) != 1 or chosen[0] not in _MODES:
        what = f"a module {unknown[0]}" if unknown else f"the pooling {' and '.join(chosen) or 'of no name'}"
        raise ConfigError(
            f"{config.path} makes its vectors with {what}, which is not known here; set model.pooling (mean or cls) "
            f"and model.normalise to train it otherwise"
        )
    return Pooling(_MODES[chosen[0]], "Normalize" in kinds)  # type: ignore[arg-type]


def _read(config: ModelConfig, name: str) -> Any:
    """Return a JSON file of the model; None where there is none."""
    path = expand_user(str(config.path)) / name
    if not path.parent.is_dir() and not expand_user(str(config.path)).is_dir():
        path = _from_hub(config, name)
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error}); put the file of the model's author back") from error


def _from_hub(config: ModelConfig, name: str) -> Path:
    from transformers.utils import cached_file

    found = cached_file(
        str(config.path),
        name,
        revision=config.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(str(found))
