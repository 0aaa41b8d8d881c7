"""Opening what can be evaluated: a run's checkpoint, a Hugging Face folder, a packed export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leanmill.core.errors import ConfigError
from leanmill.core.probes import Probe
from leanmill.data.build import build_tokenizer
from leanmill.data.tokenizer import load_tokenizer
from leanmill.export.generation import open_model
from leanmill.export.packed_folder import LAYERS
from leanmill.models.offloading import Held, is_offloaded
from leanmill.trainer.inference import load_for_inference
from leanmill.trainer.rebuild import rebuild


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model that is ready to be asked."""

    model: Any
    """Causal LM in eval mode, fp32 but for what is stored packed; techniques of a run in place."""
    tokenizer: Any
    """Its own."""
    probes: Sequence[Probe] = ()
    """What looks on while text is scored."""

    @property
    def longest(self) -> int | None:
        """Tokens that its positions reach; None where nothing limits them."""
        return getattr(self.model.config, "max_position_embeddings", None)


def open_for_evaluation(path: Path, device: torch.device, *, weights_gib: float | None = None) -> Opened:
    """Return the model at `path` on `device`.

    Args:
        path: A checkpoint folder of a run, or a folder with `config.json`.
        device: Where it is to run.
        weights_gib: The most of its weights that is held there, see `leanmill.models.offloading`; None holds all.

    Raises:
        ConfigError: There is no such model, it has no tokenizer, or a part of it cannot be held alone.
        RunError: It is damaged.
    """
    held = None if weights_gib is None else Held(weights_gib, device)
    if (path / "config.json").is_file():
        opened = _folder(path, held)
    elif held is None:
        opened = _checkpoint(path)
    else:
        raise ConfigError(
            f"{path} is of a run, whose model is built whole; type leanmill export --checkpoint {path} --to hf "
            f"--out DIR and give DIR, or leave weights_gib out"
        )
    if not is_offloaded(opened.model):
        opened.model.to(device)
    opened.model.eval().requires_grad_(False)
    return opened


def _checkpoint(path: Path) -> Opened:
    rebuilt = rebuild(path)
    data, task = rebuilt.recipe.data, rebuilt.recipe.model.task
    if task != "causal_lm":
        raise ConfigError(
            f"{path} is of model.task={task}, and these tasks are for causal models; type leanmill eval for its "
            f"held-out scores"
        )
    if rebuilt.tokenizer_dir is None:
        tokenizer: Any = build_tokenizer(data, seed=rebuilt.recipe.seed)
    else:
        # The run's own: the corpus of this machine may have changed since.
        tokenizer = load_tokenizer(str(rebuilt.tokenizer_dir), trust_remote_code=data.tokenizer.trust_remote_code)
    return Opened(model=rebuilt.model, tokenizer=tokenizer, probes=rebuilt.probes)


def _folder(path: Path, held: Held | None) -> Opened:
    tokenizer = load_tokenizer(str(path))
    if (path / LAYERS).is_file() or _is_packed(path):
        if held is not None:
            raise ConfigError(f"{path} holds packed weights, which stay in memory as they are; leave weights_gib out")
        return Opened(model=open_model(path), tokenizer=tokenizer)
    loaded = load_for_inference(path, dtype=torch.float32, held=held)
    return Opened(model=loaded.model, tokenizer=tokenizer, probes=loaded.probes)


def _is_packed(path: Path) -> bool:
    """Whether transformers unpacks its weights."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return config.get("quantization_config") is not None
