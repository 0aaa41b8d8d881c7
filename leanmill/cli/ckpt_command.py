"""`leanmill ckpt`: look into checkpoints, read them against their checksums, or write their tensors as plain files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from leanmill.core.errors import EXIT_RUN, ConfigError


if TYPE_CHECKING:
    from rich.table import Table

    from leanmill.checkpoint.manifest import Manifest


def run(args: argparse.Namespace) -> int:
    """Do `args.action` with the checkpoint, or those of the run, at `args.path`.

    Raises:
        ConfigError: There is none there, or `--out` is missing, not wanted or not empty.
        RunError: A checkpoint that is to be read is damaged.
    """
    path = Path(args.path)
    if (args.out is not None) != (args.action == "convert"):
        wanted = "needs --out FOLDER" if args.action == "convert" else "writes nothing; leave --out away"
        raise ConfigError(f"ckpt {args.action} {wanted}")
    if args.action == "convert":
        return _convert(path, Path(args.out))
    return _verify(path) if args.action == "verify" else _inspect(path, lists_tensors=args.tensors)


def _folders(path: Path) -> list[Path]:
    """The checkpoint that `path` is, or all of a run and its phases, oldest first."""
    from leanmill.checkpoint.folders import counting_folders
    from leanmill.checkpoint.manifest import MANIFEST
    from leanmill.checkpoint.phases import phase_folders

    if (path / MANIFEST).is_file():
        return [path]
    roots = [path, path / "checkpoints", *(folder / "checkpoints" for folder in phase_folders(path))]
    found = [folder for root in roots for folder in sorted(counting_folders(root))]
    if not found:
        raise ConfigError(f"no checkpoint at {path}; give a run folder such as runs/quickstart, or one of its step-*")
    return found


def _verify(path: Path) -> int:
    from leanmill.checkpoint.manifest import verify

    num_damaged = 0
    for folder in _folders(path):
        problems = verify(folder)
        num_damaged += bool(problems)
        print(f"{folder}: {'DAMAGED' if problems else 'sound'}")
        for problem in problems:
            print(f"  {problem}")
    return EXIT_RUN if num_damaged else 0


def _inspect(path: Path, *, lists_tensors: bool) -> int:
    from rich.console import Console

    from leanmill.checkpoint.manifest import read_manifest
    from leanmill.checkpoint.reading import parts_of, read_index

    console, folders = Console(highlight=False), _folders(path)
    console.print(_overview({_below(folder, path): read_manifest(folder) for folder in folders}))
    if len(folders) > 1:
        if lists_tensors:
            raise ConfigError(f"--tensors lists those of one checkpoint; give one of {path}, e.g. {folders[-1]}")
        return 0
    for part in parts_of(folders[0]):
        index = read_index(folders[0] / part)
        dtypes = sorted({str(stored.dtype).removeprefix("torch.") for stored in index.values()})
        num_chunks = sum(len(stored.chunks) for stored in index.values())
        console.print(f"{part}: {len(index):,} tensors ({', '.join(dtypes)}) in {num_chunks:,} boxes")
        for name, stored in sorted(index.items()) if lists_tensors else ():
            dtype = str(stored.dtype).removeprefix("torch.")
            console.print(f"  {name} {dtype} {list(stored.shape)}", markup=False, soft_wrap=True)
    return 0


def _below(folder: Path, path: Path) -> str:
    return folder.name if folder == path else str(folder.relative_to(path)).removeprefix("checkpoints/")


def _overview(manifests: dict[str, Manifest]) -> Table:
    from rich.table import Table

    from leanmill.report.units import size

    table = Table()
    for column in ("checkpoint", "step", "loss", "holds", "size", "its model"):
        table.add_column(column, no_wrap=column in ("checkpoint", "loss", "step"))
    for folder, manifest in manifests.items():
        sizes = {name: record.size for name, record in manifest.files.items()}
        of_model = sum(number for name, number in sizes.items() if name.startswith("model/"))
        score = "not known" if manifest.score is None else f"{manifest.score:.4f}"
        holds = f"what trains, of base {(manifest.base or '')[:12]}" if manifest.partial else "the whole model"
        table.add_row(folder, f"{manifest.step:,}", score, holds, size(sum(sizes.values())), size(of_model))
    return table


def _convert(path: Path, out: Path) -> int:
    """Write every tensor of the newest sound checkpoint at `path` whole, under its name, as safetensors."""
    from leanmill.checkpoint.reading import parts_of, read_document, read_full_state
    from leanmill.checkpoint.storage import write_tensors
    from leanmill.cli.checkpoints import resolve_checkpoint

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already; name a new folder")
    folder = resolve_checkpoint(str(path))
    out.mkdir(parents=True, exist_ok=True)
    for part in parts_of(folder):
        state = read_full_state(folder, part)
        write_tensors(out / f"{part}.safetensors", state)
        print(f"wrote {out / part}.safetensors: {len(state):,} tensors of {folder}")
    document = read_document(folder, "train_state.json")
    (out / "train_state.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0
