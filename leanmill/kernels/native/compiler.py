"""Compile a C file of this package into a shared library, once a machine, and load it.

Several operations are a few reads and one write an element. Written as tensor expressions they
cost that many passes over memory; written in C they cost one. The sources need no headers of
torch, so a compile takes about a second; its result is kept in the user's cache, named by what
went into it. Without a C compiler callers take their tensor code instead.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from leanmill.kernels.native.user_cache import is_private, user_cache


logger = logging.getLogger(__name__)

_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-std=c11", "-O3", "-march=native", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-psabi")
"""No psabi: vectors wider than the processor's pass between functions of one file only, so no caller
compiled for another processor can disagree about them."""
_MATH_FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
"""No fast-math: NaN, infinities and the order of sums are part of each operation's definition, and
without contraction a rounding decision is the one that tensor code takes. Nobody reads floating
point exceptions, and keeping them would keep selections from being vectorised."""
_HEADERS = Path(__file__).parent


@functools.cache
def load_library(source: Path) -> ctypes.CDLL | None:
    """Return the compiled `source`, or None where there is no working C compiler (logged once a file).

    Args:
        source: A `.c` file. It may include `dtypes.h`.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        logger.info("no C compiler (%s) found: %s runs as tensor code", ", ".join(_COMPILERS), source.parent.name)
        return None
    try:
        return ctypes.CDLL(str(_compiled(source, compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("%s could not be compiled and runs as tensor code: %s", source.parent.name, _reason(error))
        return None


def _compiled(source: Path, compiler: str) -> Path:
    folder = _cache_folder()
    library = folder / f"{source.parent.name}-{source.stem}-{_key(source, compiler)}.so"
    if library.exists():
        return library
    handle, partial = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        subprocess.run(
            build_command(compiler, source, partial), check=True, capture_output=True, text=True, timeout=300
        )
        # All ranks may compile at once: whoever finishes last replaces equal by equal.
        os.replace(partial, library)
    finally:
        Path(partial).unlink(missing_ok=True)
    return library


def build_command(compiler: str, source: Path, library: str) -> list[str]:
    """Return what compiles `source` into the shared `library`."""
    folders = (f"-I{_HEADERS}", f"-I{source.parent}")
    return [compiler, *_FLAGS, *_MATH_FLAGS, *folders, "-o", library, str(source), "-lm"]


def _cache_folder() -> Path:
    """The user's own cache, or a fresh private folder where that cannot be trusted."""
    folder = user_cache() / "kernels"
    try:
        folder.mkdir(exist_ok=True, mode=0o700)
        # What is loaded from here runs as this user, so nobody else may be able to write to it.
        if is_private(folder.stat()) and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="leanmill-kernels-"))


def _key(source: Path, compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=60).stdout
    digest = hashlib.sha256()
    headers = [*sorted(_HEADERS.glob("*.h")), *sorted(source.parent.glob("*.h"))]
    for part in (source.read_bytes(), *(path.read_bytes() for path in headers), version):
        digest.update(hashlib.sha256(part).digest())
    # A home folder may be shared by machines with other instructions.
    digest.update(" ".join((*_FLAGS, *_MATH_FLAGS, platform.machine(), _processor())).encode())
    return digest.hexdigest()[:20]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return " ".join(sorted({line for line in lines if line.startswith(wanted)}))


def _reason(error: Exception) -> str:
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
