"""Which checkpoints of a run stay."""

from __future__ import annotations

from pathlib import Path

from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.finding import complete_checkpoints
from leanmill.checkpoint.folders import remove


class Retention:
    """Keeps the newest sound checkpoints and the best one.

    Args:
        root: Folder of the checkpoints.
        config: How many to keep.
    """

    def __init__(self, root: Path, config: CheckpointConfig) -> None:
        self.root, self.config = root, config
        self._damaged: set[Path] = set()

    def distrust(self, paths: set[Path]) -> None:
        """Let these, found damaged, not count among those that stay."""
        self._damaged |= paths

    def apply(self, *, written: Path) -> None:
        """Remove what need not stay, now that `written` is complete."""
        self._damaged.discard(written)
        present = complete_checkpoints(self.root)
        sound = [(path, manifest) for path, manifest in present if path not in self._damaged]
        keep = {path for path, _ in sound[: self.config.keep_last]}
        keep |= {path for path, manifest in sound if manifest.step in self.config.keep_steps}
        scored = [(manifest.score, path) for path, manifest in sound if manifest.score is not None]
        if self.config.keep_best and scored:
            keep.add(min(scored)[1])
        for path, _ in present:
            if path not in keep:
                remove(path)
