"""Copies of checkpoints in an object store, through fsspec. Imports no torch.

| name | meaning |
|---|---|
| `step-N-S/` | the S-th save of the run, of step N; it counts once its `manifest.json` is there, which goes last |
| `step-N-S/.rank-R` | rank R has brought its share of that save |
| `owner.json` | who writes here: whoever began last |

An object store renames nothing and replaces files one by one. So no save ever writes over another one's files, and
what was not finished is known by its missing manifest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from leanmill.checkpoint.manifest import MANIFEST, Manifest, parse_manifest
from leanmill.core.errors import ConfigError, RunError


_SAVE = re.compile(r"step-\d{8,}-\d+")
OWNER = "owner.json"


def is_url(text: str) -> bool:
    """Whether a text names a place that fsspec reaches, rather than a path."""
    return "://" in text


class RemoteFolder:
    """A folder of checkpoints in an object store.

    Args:
        url: Where, in fsspec's spelling: `s3://bucket/runs/a`, `gs://...`, `abfs://...`, `file:///mnt/...`.

    Raises:
        ConfigError: There is no such kind of store, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        try:
            self._fs, root = url_to_fs(self.url)
        except ImportError as error:
            raise ConfigError(f"{self.url}: {error}; type {_how_to_install(self.url)}") from error
        except ValueError as error:
            raise ConfigError(f"{self.url}: {error}; give a URL such as s3://bucket/runs/NAME") from error
        self._root = root.rstrip("/")

    def saves(self) -> list[tuple[str, Manifest]]:
        """Return the names of complete saves with their manifests, newest first.

        Raises:
            RunError: The store cannot be read.
        """
        names = self.names()
        try:
            found = [(name, self._manifest(name)) for name in names]
        except Exception as error:  # whatever a store's own client raises
            raise RunError(f"{self.url} cannot be read: {one_line(error)}") from error
        present = [(name, manifest) for name, manifest in found if manifest is not None]
        return sorted(present, key=lambda item: item[1].sequence, reverse=True)

    def highest_sequence(self) -> int:
        """Return the highest sequence of all saves, finished or not; 0 where there is none.

        Raises:
            RunError: The store cannot be read.
        """
        return max((int(name.rpartition("-")[2]) for name in self.names()), default=0)

    def names(self) -> list[str]:
        """Return the names of all saves, finished or not.

        Raises:
            RunError: The store cannot be read.
        """
        try:
            return sorted(name for name in self.present("") if _SAVE.fullmatch(name))
        except Exception as error:  # whatever a store's own client raises
            raise RunError(f"{self.url} cannot be read: {one_line(error)}") from error

    def _manifest(self, name: str) -> Manifest | None:
        """The manifest of a save; None of one that was never finished, or is damaged."""
        try:
            return parse_manifest(self.read(f"{name}/{MANIFEST}"), f"{self.url}/{name}/{MANIFEST}")
        except (FileNotFoundError, RunError):
            return None

    def read(self, name: str) -> bytes:
        """Return a small file's bytes; FileNotFoundError where there is none."""
        content: bytes = self._fs.cat_file(f"{self._root}/{name}")
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        self._with_folder(name, lambda path: self._fs.pipe_file(path, content))

    def put(self, source: Path, name: str) -> None:
        """Upload a file."""
        self._with_folder(name, lambda path: self._fs.put_file(str(source), path))

    def get(self, name: str, target: Path) -> None:
        """Download a file."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self._fs.get_file(f"{self._root}/{name}", str(target))

    def present(self, name: str) -> set[str]:
        """Return the names of what lies directly in a save, or with an empty name in the folder itself."""
        self._fs.invalidate_cache()
        try:
            listed = self._fs.ls(f"{self._root}/{name}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return set()
        return {str(path).rstrip("/").rpartition("/")[2] for path in listed}

    def delete(self, names: Iterable[str]) -> None:
        """Delete files that are there."""
        for name in names:
            self._fs.rm_file(f"{self._root}/{name}")

    def delete_save(self, name: str) -> None:
        """Delete a save: it stops counting at once, before its other files go."""
        with suppress(FileNotFoundError):
            self.delete([f"{name}/{MANIFEST}"])
        self._fs.rm(f"{self._root}/{name}", recursive=True)

    def claim(self, token: str) -> None:
        """Say that whoever has this token writes here from now on.

        Raises:
            RunError: The store cannot be written.
        """
        try:
            self.write(OWNER, json.dumps({"token": token}).encode())
        except Exception as error:
            raise RunError(f"{self.url} cannot be written: {one_line(error)}") from error

    def is_claimed_by(self, token: str) -> bool:
        """Whether nobody else has begun to write here since `claim(token)`; somebody may have emptied the place."""
        try:
            owner: dict[str, Any] = json.loads(self.read(OWNER))
        except FileNotFoundError:
            return True
        return owner.get("token") == token

    def _with_folder(self, name: str, action: Callable[[str], object]) -> None:
        """Do `action` with a file's path; stores that know folders get its folder first."""
        path = f"{self._root}/{name}"
        try:
            action(path)
        except FileNotFoundError:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            action(path)


def _how_to_install(url: str) -> str:
    if url.startswith(("s3://", "s3a://")):
        return "pip install 'leanmill[s3]'"
    return f"pip install 'fsspec[{url.partition('://')[0]}]'"


def name_of(manifest: Manifest) -> str:
    """Return the name of a save in the store."""
    return f"step-{manifest.step:08d}-{manifest.sequence}"


def one_line(error: BaseException) -> str:
    """Return an error as one line, with its kind."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
