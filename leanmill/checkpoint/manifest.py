"""The manifest that makes a checkpoint folder count: names, sizes and checksums of all its files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any

from leanmill.core.errors import RunError


MANIFEST = "manifest.json"
FORMAT = "leanmill-checkpoint-1"
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a file must look like."""

    size: int
    """Bytes."""
    xxh3_128: str
    """Checksum, hexadecimal. It finds damage, not malice."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The last file written into a checkpoint."""

    step: int
    sequence: int
    """Counts the saves of a run folder; the newest has the highest, whatever its step (a run that
    went back to an earlier checkpoint writes lower steps later)."""
    score: float | None = None
    """Validation loss, lower is better; None where it is not known. NaN and infinities count as not
    known, since nothing can be compared with them."""
    partial: bool = False
    """Only some parameters of the model are in it (adapter runs)."""
    base: str | None = None
    """Fingerprint of the model that a partial checkpoint belongs to."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    """By path inside the checkpoint folder, which none may leave."""

    def __post_init__(self) -> None:
        if self.score is not None and not math.isfinite(self.score):
            object.__setattr__(self, "score", None)
        if not isinstance(self.step, int) or not isinstance(self.sequence, int):
            raise TypeError("step and sequence are whole numbers")
        for name in self.files:
            if _leads_out(name):
                raise ValueError(f"{name!r} is no path inside the checkpoint")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and flush the manifest; from here on the folder is complete."""
    content = {"format": FORMAT, **asdict(manifest)}
    write_json(folder / MANIFEST, {**content, "digest": _digest_json(content)})


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a complete checkpoint.

    Raises:
        RunError: There is none, or it is damaged; the message names the file.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise RunError(f"{path}: missing, so the checkpoint was never finished; use an earlier one") from error
    except OSError as error:
        raise RunError(f"{path}: damaged ({error}); use an earlier checkpoint") from error
    return parse_manifest(content, str(path))


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Return the manifest that a file holds.

    Args:
        content: The file's bytes.
        where: What the file is called, for the message.

    Raises:
        RunError: It is damaged.
    """
    try:
        raw: dict[str, Any] = json.loads(content)
        digest = raw.pop("digest")
        if raw.pop("format") != FORMAT:
            raise RunError(f"{where}: written by another version of leanmill, whose format this one cannot read")
        if digest != _digest_json({"format": FORMAT, **raw}):
            raise ValueError("checksum differs")
        files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
        return Manifest(files=files, **raw)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{where}: damaged ({error}); use an earlier checkpoint") from error


def confined(folder: Path, name: str) -> Path:
    """Return `folder / name`, refusing what leads out of `folder`, by name or by symbolic link.

    A checkpoint may come from elsewhere; reading it must not read other files of this machine.

    Raises:
        RunError: It leads out.
    """
    path = folder / name
    if _leads_out(name) or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise RunError(
            f"{path} leads out of the checkpoint, so it is damaged or not to be trusted; use another one (a link to "
            f"a file that belongs there can be replaced by a copy)"
        )
    return path


def _leads_out(name: str) -> bool:
    parts = PurePath(name).parts
    return not parts or "\0" in name or PurePath(name).is_absolute() or ".." in parts


def verify(path: str | Path, *, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Compare a checkpoint's files with its manifest, sizes first, then checksums.

    Args:
        path: The checkpoint folder.
        share: (rank, world size): which share of the files to read for their checksums.

    Returns:
        One line a problem, each naming a file; empty when the checkpoint is sound.
    """
    folder = Path(path)
    try:
        manifest = read_manifest(folder)
    except RunError as error:
        return [str(error)]
    problems = []
    for name, record in manifest.files.items():
        try:
            path = confined(folder, name)
            size = path.stat().st_size if path.is_file() else None
        except (RunError, OSError) as error:
            problems.append(str(error))
            continue
        if size is None:
            problems.append(f"{path}: missing")
        elif size != record.size:
            problems.append(f"{path}: {size} bytes where {record.size} were written")
    if problems:
        return problems
    rank, world_size = share
    for name in sorted(manifest.files)[rank::world_size]:
        try:
            if digest_file(folder / name) != manifest.files[name].xxh3_128:
                problems.append(f"{folder / name}: contents differ from what was written (checksum)")
        except OSError as error:
            problems.append(f"{folder / name}: unreadable ({error.strerror})")
    return problems


def record_file(path: Path) -> FileRecord:
    """Describe a file that has just been written."""
    return FileRecord(size=path.stat().st_size, xxh3_128=digest_file(path))


def digest_file(path: Path) -> str:
    """Checksum of a file's bytes."""
    import xxhash

    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        block = memoryview(bytearray(_BLOCK_BYTES))
        while num_bytes := file.readinto(block):
            state.update(block[:num_bytes])
    return state.hexdigest()


def write_json(path: Path, value: object, *, compact: bool = False) -> None:
    """Write JSON and flush it to the disk; `compact` on one line, which takes a tenth of the time."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, separators=(",", ":")) if compact else json.dumps(value, indent=1))
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk (names of files, renames)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest_json(content: Mapping[str, Any] | Sequence[Any]) -> str:
    import xxhash

    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
