"""Names of checkpoint folders and the renames between them. Imports no torch.

| name | meaning |
|---|---|
| `step-N.tmp` | being written; never counts |
| `step-N` | complete, if its manifest says so |
| `step-N.old` | displaced by another save of step N; counts while `step-N` is missing |
| `step-N.gone` | being deleted; never counts |

Each change is one rename, so whatever kills a run leaves the earlier state or the later one.
"""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

from leanmill.checkpoint.manifest import sync_folder


WRITING, DISPLACED, DOOMED = ".tmp", ".old", ".gone"


def step_folder(root: Path, step: int) -> Path:
    """Return the name under which the checkpoint of `step` counts."""
    return root / f"step-{step:08d}"


def counting_folders(root: Path) -> list[Path]:
    """Return the folders below `root` that count as checkpoints, whole or damaged, by name."""
    if not root.is_dir():
        return []
    return sorted(
        path
        for path in root.glob("step-*")
        if path.suffix == "" or (path.suffix == DISPLACED and not path.with_suffix("").exists())
    )


def is_passing(path: Path) -> bool:
    """Whether a folder's name says that a save or a deletion is under way in it."""
    if not path.name.startswith("step-"):
        return False
    replaced = path.suffix == DISPLACED and path.with_suffix("").exists()
    return replaced or path.suffix.startswith((WRITING, DOOMED))


def begin(temporary: Path) -> None:
    """Create the folder a save is written into, and clear away what a killed run left."""
    root = temporary.parent
    root.mkdir(parents=True, exist_ok=True)
    settle(root)
    temporary.mkdir()


def publish(temporary: Path) -> None:
    """Give a complete folder its final name, in place of an earlier save of the same step."""
    final = temporary.with_suffix("")
    displaced = final.with_suffix(DISPLACED)
    replaces = final.exists() or final.is_symlink()
    if replaces:
        os.rename(final, displaced)
    os.rename(temporary, final)
    sync_folder(final.parent)
    if replaces:
        remove(displaced)


def settle(root: Path) -> None:
    """Undo or finish what was under way when a save ended early: half-written, displaced, half-deleted folders."""
    for displaced in root.glob(f"step-*{DISPLACED}"):
        if not displaced.with_suffix("").exists():
            os.rename(displaced, displaced.with_suffix(""))
        else:
            remove(displaced)
    for temporary in root.glob(f"step-*{WRITING}"):
        remove(temporary)
    for doomed in root.glob(f"step-*{DOOMED}*"):
        _delete(doomed)


def remove(path: Path) -> None:
    """Delete a checkpoint folder; it stops counting at once, before its files go one by one.

    Of a symbolic link only the link goes. What cannot be deleted now (a file that another machine
    still reads over NFS) goes before a later save.
    """
    names = (path.with_suffix(f"{DOOMED}{number or ''}") for number in itertools.count())
    doomed = next(name for name in names if not name.exists() and not name.is_symlink())
    os.rename(path, doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
