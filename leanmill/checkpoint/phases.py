"""The folders of a run with phases. Imports no torch.

| path | what it is |
|---|---|
| `phases/01-dense/` | the run folder of a phase that trains, with checkpoints, metrics and report |
| `phases/02-prune/passed/` | what the passes of a phase wrote, a Hugging Face folder |
| `phases/02-prune/solved/` | the same before its weights were rewound to an earlier phase's |
| `phases/02-prune/drawn/` | weights drawn anew that it was given instead |
| `phases/03-best/scored/` | scores of the documents of its data, of whose best it trains |
| `phases/03-best/scored/asked.json` | what decided them |
| `phases/03-best/scoring/` | the same while they are written, shard by shard |
| `phases/01-dense/model/` | the phase's model folded, once another phase starts from it |
| `phases/01-dense/done.json` | the phase is finished, and how it was asked for |
"""

from __future__ import annotations

from pathlib import Path


PHASES, PASSED, SOLVED, DRAWN, MODEL, DONE = "phases", "passed", "solved", "drawn", "model", "done.json"
SCORED, SCORING, ASKED = "scored", "scoring", "asked.json"


def phase_folder(run_dir: Path, index: int, name: str) -> Path:
    """Return the folder of a phase, by its index from 0."""
    return run_dir / PHASES / f"{index + 1:02d}-{name}"


def phase_folders(run_dir: Path) -> list[Path]:
    """Return the folders of the phases that began, in order."""
    root = run_dir / PHASES
    return sorted(path for path in root.glob("[0-9][0-9]*-*") if path.is_dir()) if root.is_dir() else []


def where_it_is_now(path: str, checkpoint_dir: Path) -> str:
    """Return the path of a model that another phase of a checkpoint's run left: run folders are moved and copied.

    Any other path is returned as it is.
    """
    parts, phases = Path(path).parts, checkpoint_dir.parent.parent.parent
    if len(parts) >= 3 and parts[-3] == PHASES == phases.name:
        moved = phases.joinpath(*parts[-2:])
        if moved.is_dir():
            return str(moved)
    return path
