"""Configuration of checkpoints. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from leanmill.core.config import Config


class CheckpointConfig(Config):
    """When state is written and which copies stay."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; None writes only at the end."""
    keep_last: int = Field(default=2, ge=2)
    """Newest checkpoints kept; at least 2, since the newest may be mid-write."""
    keep_steps: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """Steps after which a checkpoint is written and stays, whatever else is kept; for rewinding."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""
    asynchronous: bool = True
    """Write in the background while training goes on."""
    resume: str = "auto"
    """`auto` continues from the newest complete checkpoint of `run_dir` where there is one, `never`
    refuses a run_dir that has one, a path loads that checkpoint."""
    accept_changes: list[str] = Field(default_factory=list)
    """Keys of the recipe, or sections, that may differ from the checkpoint a run resumes although they
    change what is trained, e.g. `[optimizer.lr, techniques.ternary]`. Such changes are refused otherwise."""
