"""Runs the jobs and writes docs/jobs: each one's commands beside what they print.

    python tests/jobs/transcript.py

The six are run one after the other in an empty folder, which takes some minutes; the test of the jobs does the same
and holds what it sees against the pages.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
PAGES = ROOT / "docs" / "jobs"
SIZES = FOLDER / "tiny.sh"
CHECKS = ("grep -q", "test -s")
"""Beginnings of lines that are there for the test, not for a reader."""
TITLES = {
    "1_pretrain": "1. Train from scratch",
    "2_finetune": "2. Fine-tune on conversations",
    "3_sparse": "3. Make it sparse",
    "4_distill": "4. Distill into a smaller one",
    "5_compress": "5. Compress in one shot",
    "6_compare": "6. Compare runs",
}
NOTE = """!!! note "Real output"
    This page is written by running the commands in one folder, after those of the jobs before it: `models/base` is
    what [the first](pretrain.md) writes. `leanmill` is there after `pip install -e '.[all]'` in a clone, or after
    `make train` and `source .venv/bin/activate`. Sizes are such that each ends in seconds, in bash; the recipe's own
    hold without:

    ```sh
{sizes}
    ```
"""
MOST_LINES = 44
"""Of an output; the middle of what is longer is left out."""


@dataclass
class Exchange:
    """Some lines of a script and what they printed."""

    lines: list[str]
    output: list[str] = field(default_factory=list)


def scripts() -> list[Path]:
    """The jobs, in order."""
    return sorted(FOLDER.glob("[0-9]_*.sh"))


def run(script: Path, folder: Path, *, timeout: float) -> list[Exchange]:
    """Run one job in `folder`, after those before it.

    Raises:
        AssertionError: It ended with an error, or with other commands than its own.
    """
    programs = folder.parent / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "leanmill").write_text(f'#!/bin/sh\nexec {sys.executable} -m leanmill "$@"\n', encoding="utf-8")
    (programs / "leanmill").chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    # `-v` prints each command as it is read, so it stands before its output.
    done = subprocess.run(
        ["bash", "-v", script],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{script.name}\n{done.stdout[-6000:]}"
    return _exchanges(script, done.stdout.replace(f"{folder}/", ""))


def _exchanges(script: Path, transcript: str) -> list[Exchange]:
    first, source, *rest = script.read_text(encoding="utf-8").splitlines()
    waiting = [first, source, *SIZES.read_text(encoding="utf-8").splitlines(), *rest]
    found = [Exchange([])]
    for line in transcript.splitlines():
        if waiting and line == waiting[0]:
            if found[-1].output:
                found.append(Exchange([]))
            if len(waiting) <= len(rest):
                found[-1].lines.append(waiting[0])
            waiting.pop(0)
        else:
            found[-1].output.append(line.rstrip())
    assert not waiting, f"{script.name}: bash did not read {waiting[0]!r}"
    return found


def commands(script: Path) -> list[str]:
    """Return the lines of a job behind its first comment and what all of them source."""
    return script.read_text(encoding="utf-8").splitlines()[2:]


def shown(lines: list[str]) -> list[str]:
    """Return those lines that are for a reader."""
    return [line for line in lines if not line.startswith(CHECKS)]


def page(script: Path, exchanges: list[Exchange]) -> str:
    """Return the page of a job."""
    title = script.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    return "\n".join([f"# {TITLES[script.stem]}\n", f"{title}\n", NOTE.format(sizes=sizes()), *_blocks(exchanges)])


def sizes() -> str:
    """What the jobs call `$SCORED` and `$TINY`, as a page shows it."""
    lines = SIZES.read_text(encoding="utf-8").splitlines()
    return "\n".join(f"    {line}" for line in lines[next(n for n, line in enumerate(lines) if "=" in line) :])


def _blocks(exchanges: list[Exchange]) -> Iterator[str]:
    for exchange in exchanges:
        lines = shown(exchange.lines)
        while lines and lines[0].startswith("#"):
            yield lines.pop(0).removeprefix("# ") + "\n"
        if lines:
            yield "\n".join(["```bash", *lines, "```", ""])
        if exchange.output:
            yield "\n".join(["```text", *_cut(exchange.output), "```", ""])


def _cut(output: list[str]) -> list[str]:
    if len(output) <= MOST_LINES:
        return output
    half = MOST_LINES // 2
    return [*output[:half], f"... {len(output) - 2 * half} lines more ...", *output[-half:]]


def main() -> None:
    """Run all and write their pages."""
    PAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="leanmill-jobs-") as name:
        folder = Path(name) / "work"
        folder.mkdir()
        for script in scripts():
            text = page(script, run(script, folder, timeout=1800))
            (PAGES / f"{script.stem[2:]}.md").write_text(text, encoding="utf-8")
            print(f"wrote {PAGES / script.stem[2:]}.md", flush=True)


if __name__ == "__main__":
    main()
