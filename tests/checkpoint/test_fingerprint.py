"""Equal bases have equal fingerprints, others do not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from leanmill.checkpoint.fingerprint import fingerprint_config, fingerprint_folder
from leanmill.core.errors import ConfigError


def test_folder(tmp_path: Path) -> None:
    for name, value in [("a", 1.0), ("b", 1.0), ("c", 2.0)]:
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((3,), value)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "README.md").write_text(name)
    a, b, c = (fingerprint_folder(tmp_path / name) for name in "abc")
    assert a == b != c
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="safetensors"):
        fingerprint_folder(tmp_path / "empty")


def test_config() -> None:
    config = {"model_type": "llama", "hidden_size": 32}
    assert fingerprint_config(config, 0) == fingerprint_config(dict(reversed(config.items())), 0)
    assert fingerprint_config(config, 0) != fingerprint_config(config, 1)
    assert fingerprint_config(config, 0) != fingerprint_config({**config, "hidden_size": 64}, 0)
