"""Which checkpoints of a run stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.finding import complete_checkpoints
from leanmill.checkpoint.folders import remove
from leanmill.checkpoint.manifest import Manifest


Key = TypeVar("Key", Path, str)


def kept(present: Sequence[tuple[Key, Manifest]], config: CheckpointConfig) -> set[Key]:
    """Return which of these checkpoints, newest first, stay: the newest, those asked for by step, and the best."""
    keep = {key for key, _ in present[: config.keep_last]}
    keep |= {key for key, manifest in present if manifest.step in config.keep_steps}
    scored = [(manifest.score, key) for key, manifest in present if manifest.score is not None]
    if config.keep_best and scored:
        keep.add(min(scored)[1])
    return keep


class Retention:
    """Keeps the newest sound checkpoints and the best one.

    Args:
        root: Folder of the checkpoints.
        config: How many to keep.
    """

    def __init__(self, root: Path, config: CheckpointConfig) -> None:
        self.root, self.config = root, config
        self.damaged: set[Path] = set()
        """Found damaged, so that they do not count among those that stay."""
        self._in_use: Callable[[], Path | None] = lambda: None

    def spare(self, in_use: Callable[[], Path | None]) -> None:
        """Leave the folder that `in_use` names at the time: somebody reads it."""
        self._in_use = in_use

    def apply(self, *, written: Path) -> None:
        """Remove what need not stay, now that `written` is complete."""
        self.damaged.discard(written)
        present = complete_checkpoints(self.root)
        keep = kept([(path, manifest) for path, manifest in present if path not in self.damaged], self.config)
        in_use = self._in_use()
        for path, _ in present:
            if path not in keep and path != in_use:
                remove(path)
