"""Opens a page in headless Chromium."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@dataclass(frozen=True)
class Opened:
    dom: str
    """The document after its scripts ran."""
    console: list[str]
    """What scripts and the browser logged, uncaught errors and policy violations included."""


def open_page(path: Path, *flags: str) -> Opened:
    assert BINARY is not None
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        done = subprocess.run(
            [
                BINARY,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--enable-logging=stderr",
                "--v=0",
                "--virtual-time-budget=3000",
                f"--user-data-dir={profile}",
                *flags,
                "--dump-dom",
                path.resolve().as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    return Opened(dom=done.stdout, console=[line for line in done.stderr.splitlines() if "CONSOLE" in line])
