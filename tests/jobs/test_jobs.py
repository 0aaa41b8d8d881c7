"""What a newcomer does, by the documented commands alone: one script a job, in an empty folder, one after the other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]


@pytest.mark.slow
def test_every_job_ends_well(tmp_path):
    scripts = sorted(FOLDER.glob("[0-9]_*.sh"))
    assert len(scripts) == 6
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "leanmill").write_text(f'#!/bin/sh\nexec {sys.executable} -m leanmill "$@"\n', encoding="utf-8")
    (programs / "leanmill").chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    work = tmp_path / "work"
    work.mkdir()
    for script in scripts:
        done = subprocess.run(
            ["bash", script],
            cwd=work,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, f"{script.name}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
