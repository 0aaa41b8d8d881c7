"""Configuration of checkpoints. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

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
    refuses a run_dir that has one, a path loads that checkpoint; a URL the newest of a `remote`."""
    remote: str | None = None
    """Where copies of checkpoints go, as a URL that fsspec knows (`s3://bucket/runs/{name}`, `gs://`, `abfs://`,
    `file:///mnt/...`; `{name}` is the run's). They are brought there beside training and kept as those of `run_dir`
    are. `resume: auto` goes on from the newest of both."""
    accept_changes: list[str] = Field(default_factory=list)
    """Keys of the recipe, or sections, that may differ from the checkpoint a run resumes although they
    change what is trained, e.g. `[optimizer.lr, techniques.ternary]`. Such changes are refused otherwise."""

    @field_validator("remote")
    @classmethod
    def _is_a_url(cls, remote: str | None) -> str | None:
        if remote is not None and "://" not in remote:
            raise ValueError(f"remote is {remote!r}; give a URL, e.g. s3://bucket/runs/{{name}}, or file:///mnt/copies")
        return remote
