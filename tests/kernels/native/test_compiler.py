from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import torch

from leanmill.kernels.native import compiler, threads
from leanmill.kernels.native.dtypes import is_plain_cpu, pointer


ROUND_TRIP = """
#include "dtypes.h"
void round_bf16(const float *in, bf16_t *out, int64_t n) { for (int64_t i = 0; i < n; i++) store_bf16(out + i, in[i]); }
void round_fp16(const float *in, fp16_t *out, int64_t n) { for (int64_t i = 0; i < n; i++) store_fp16(out + i, in[i]); }
void widen_bf16(const bf16_t *in, float *out, int64_t n) { for (int64_t i = 0; i < n; i++) out[i] = load_bf16(in + i); }
void widen_fp16(const fp16_t *in, float *out, int64_t n) { for (int64_t i = 0; i < n; i++) out[i] = load_fp16(in + i); }
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


SOURCES = sorted(Path(compiler.__file__).parents[1].glob("*/*.c"))
COMPILERS = [name for name in ("gcc", "gcc-11", "clang") if shutil.which(name)]


def write(folder: Path, text: str) -> Path:
    path = folder / "case.c"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", COMPILERS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.parent.name)
def test_every_compiler_builds_every_source_without_a_warning(source: Path, name: str, tmp_path: Path) -> None:
    command = compiler.build_command(name, source, str(tmp_path / "library.so"))
    # Less optimised, for the time it takes: what a compiler knows and warns of is the same.
    built = subprocess.run([*command, "-O1", "-Werror"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr


@pytest.mark.parametrize("name", COMPILERS)
def test_rounding_is_that_of_torch(name: str, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_COMPILERS", (name,))
    library = compiler.load_library(write(tmp_path, ROUND_TRIP))
    assert library is not None
    bits = torch.randint(-(2**31), 2**31 - 1, (100_003,), dtype=torch.int64).to(torch.int32)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.3895e38, 65520.0, 1e-8])
    # Halfway between neighbours of fp16, and one step to either side.
    fp16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    ties = (fp16.float().view(torch.int32).unsqueeze(1) + torch.tensor([0xFFF, 0x1000, 0x1001])).view(torch.float32)
    values = torch.cat([bits.view(torch.float32), special, ties.flatten(), torch.rand(100_000) * 1e-5])
    for dtype, name in ((torch.bfloat16, "round_bf16"), (torch.float16, "round_fp16")):
        got = torch.empty_like(values, dtype=dtype)
        getattr(library, name)(pointer(values), pointer(got), ctypes.c_int64(values.numel()))
        torch.testing.assert_close(got, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype, name in ((torch.bfloat16, "widen_bf16"), (torch.float16, "widen_fp16")):
        widened = torch.empty(halves.shape)
        getattr(library, name)(pointer(halves), pointer(widened), ctypes.c_int64(halves.numel()))
        torch.testing.assert_close(widened, halves.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_a_library_is_compiled_once_and_again_when_its_source_changes(tmp_path: Path, home: Path) -> None:
    cache = home / ".cache" / "leanmill" / "kernels"
    source = write(tmp_path, "int answer(void) { return 1; }")
    assert compiler.load_library(source).answer() == 1  # type: ignore[union-attr]
    (library,) = cache.glob("*.so")
    written = library.stat().st_mtime_ns
    compiler.load_library.cache_clear()
    assert compiler.load_library(source).answer() == 1  # type: ignore[union-attr]
    assert [path.stat().st_mtime_ns for path in cache.glob("*.so")] == [written]
    source.write_text("int answer(void) { return 2; }")
    compiler.load_library.cache_clear()
    assert compiler.load_library(source).answer() == 2  # type: ignore[union-attr]
    assert len(list(cache.glob("*.so"))) == 2
    (tmp_path / "beside.h").write_text("#define ANSWER 3")
    source.write_text('#include "beside.h"\nint answer(void) { return ANSWER; }')
    compiler.load_library.cache_clear()
    assert compiler.load_library(source).answer() == 3  # type: ignore[union-attr]
    (tmp_path / "beside.h").write_text("#define ANSWER 4")
    compiler.load_library.cache_clear()
    assert compiler.load_library(source).answer() == 4  # type: ignore[union-attr]


def test_a_cache_that_others_can_write_is_not_used(tmp_path: Path, home: Path) -> None:
    cache = home / ".cache" / "leanmill" / "kernels"
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert compiler.load_library(write(tmp_path, "int one(void) { return 1; }")) is not None
    assert list(cache.iterdir()) == []
    assert stat.S_IMODE(compiler._cache_folder().stat().st_mode) == 0o700


def test_source_that_does_not_compile_is_reported_once(
    tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path, "this is not C")
    assert compiler.load_library(source) is None
    assert compiler.load_library(source) is None
    assert len([r for r in caplog.records if "runs as tensor code" in r.message]) == 1
    assert list((home / ".cache" / "leanmill" / "kernels").iterdir()) == []


def test_without_a_compiler_there_is_no_library(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    assert compiler.load_library(write(tmp_path, "int one(void) { return 1; }")) is None


@pytest.fixture(params=["torch's threads", "plain threads"])
def either_team(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain threads":
        monkeypatch.setattr(threads, "_torch_team", lambda: None)
    elif threads._torch_team() is None:
        pytest.skip("this torch does not run on GNU's OpenMP")


@pytest.mark.usefixtures("either_team")
@pytest.mark.parametrize("num_rows", [0, 1, 7, 1000])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_rows_are_covered_once(num_rows: int, num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    seen = torch.zeros(num_rows, dtype=torch.int64)

    def work(first: int, last: int) -> None:
        seen[first:last] += 1

    threads.parallel_for(work, num_rows, threads.GRAIN_ELEMENTS)
    assert torch.equal(seen, torch.ones_like(seen))


@pytest.mark.usefixtures("either_team")
def test_threads_report_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def work(first: int, last: int) -> None:
        if first > 0:
            raise RuntimeError("second half")

    with pytest.raises(RuntimeError, match="second half"):
        threads.parallel_for(work, 2, threads.GRAIN_ELEMENTS)


@pytest.mark.usefixtures("either_team")
def test_a_forked_child_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    threads.parallel_for(lambda first, last: None, 2, threads.GRAIN_ELEMENTS)
    child = os.fork()
    if child == 0:
        threads.parallel_for(lambda first, last: None, 2, threads.GRAIN_ELEMENTS)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_only_plain_cpu_tensors_are_taken() -> None:
    assert is_plain_cpu(torch.zeros(2), torch.nn.Parameter(torch.zeros(2)))
    assert not is_plain_cpu(torch.zeros(2, dtype=torch.float64))
    assert not is_plain_cpu(torch.zeros(2, device="meta"))
