"""What a frozen base model is recognised by, so that adapters are not resumed on another one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leanmill.checkpoint.manifest import digest_file
from leanmill.core.errors import ConfigError


def fingerprint_folder(folder: str | Path) -> str:
    """Fingerprint a checkpoint folder by the contents of its safetensors files; 10 GB take a second.

    Args:
        folder: Local folder (of a hub model: its snapshot).

    Raises:
        ConfigError: It has no safetensors files.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} has no *.safetensors files; only such checkpoints can be a base model")
    return _digest({file.name: digest_file(file) for file in files})


def fingerprint_config(config: Mapping[str, Any], seed: int) -> str:
    """Fingerprint a randomly initialised base by what determines its weights."""
    return _digest({"config": config, "seed": seed})


def _digest(content: Mapping[str, Any]) -> str:
    import xxhash

    return xxhash.xxh3_128(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
