"""Whether an adapter belongs to the model that trains."""

from __future__ import annotations

from leanmill.checkpoint.fingerprint import fingerprint_folder
from leanmill.core.errors import ConfigError
from leanmill.core.paths import expand_user
from leanmill.models.config import ModelConfig
from leanmill.models.pretrained import weights_folder


def check_base(model: ModelConfig, base: str, adapter: str) -> None:
    """Refuse an adapter of another base than `model`, by name, or else by the contents of both.

    Args:
        model: What trains.
        base: Folder or hub name of the model that the adapter belongs to.
        adapter: What a recipe calls the adapter, for the message.

    Raises:
        ConfigError: In one line, with what to set.
    """
    if model.path is None:
        raise ConfigError(f"{adapter} belongs to {base}, and the run begins with random weights; set model.path={base}")
    if base == model.path or expand_user(base).resolve() == expand_user(model.path).resolve():
        return
    theirs = _digest(ModelConfig(path=base))
    if theirs is None:
        raise ConfigError(
            f"{adapter} belongs to {base}, which is not on this machine to be compared with model.path={model.path}; "
            f"set model.path={base}, or name {model.path} in its adapter_config.json where they are the same model"
        )
    if theirs != _digest(model):
        raise ConfigError(
            f"{adapter} belongs to {base}, whose weights are not those of model.path={model.path}; set "
            f"model.path={base}, or leave the adapter out"
        )


def _digest(model: ModelConfig) -> str | None:
    """Digest of a model's weights; None for one that is not on this machine."""
    try:
        found = weights_folder(model, downloads=False)
    except ConfigError:
        return None
    return None if found is None else fingerprint_folder(found[0])
