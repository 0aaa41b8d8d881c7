"""What `accelerate launch` was asked for, held against the recipe, which alone decides how a run is trained."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from leanmill.core.errors import ConfigError


if TYPE_CHECKING:
    from leanmill.recipe.root import Recipe


def check_accelerate(recipe: Recipe, asked: Mapping[str, str], launcher: Sequence[str] = ()) -> None:
    """Refuse a start by `accelerate launch` that asked for something else than the recipe.

    Args:
        recipe: The recipe.
        asked: The environment, in which accelerate says what it was asked for.
        launcher: Command line of the process that started this one.

    Raises:
        ConfigError: Engine or precision are others, or it starts fewer processes than it was told to.
    """
    for key, engine in (("ACCELERATE_USE_FSDP", "fsdp"), ("ACCELERATE_USE_DEEPSPEED", "deepspeed")):
        if asked.get(key, "").lower() in ("true", "1") and recipe.engine.type != engine:
            raise ConfigError(
                f"accelerate launch was asked for {engine}, and the recipe says engine.type={recipe.engine.type}; add "
                f"engine={engine}, or leave it out of accelerate's flags and configuration"
            )
    precision = asked.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "", recipe.train.precision) and (
        precision != "bf16" or recipe.train.precision == "fp32"
    ):
        raise ConfigError(
            f"accelerate launch was asked for mixed precision {precision}, and the recipe says train.precision="
            f"{recipe.train.precision}; start with --mixed_precision no, and set train.precision to bf16, fp32 or auto"
        )
    num_asked = _num_processes(launcher)
    if "WORLD_SIZE" not in asked and num_asked > 1:
        raise ConfigError(
            f"accelerate launch --cpu starts one process, not the {num_asked} it was asked for; type "
            f"leanmill launch --ranks {num_asked} RECIPE, or torchrun --nproc-per-node {num_asked} launch/train.py ..."
        )


def parent_command() -> list[str]:
    """Return the command line of the parent process, where the system tells; else nothing."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []


def _num_processes(command: Sequence[str]) -> int:
    """What follows `--num_processes` on a command line of `accelerate launch`."""
    words = [word.replace("-", "_") for word in command]
    if not any(word.endswith("accelerate") or "accelerate.commands" in word for word in command[:4]):
        return 1
    for index, word in enumerate(words):
        name, _, value = word.partition("=")
        if name == "__num_processes":
            value = value or (command[index + 1] if index + 1 < len(command) else "")
            return int(value) if value.isdigit() else 1
    return 1
