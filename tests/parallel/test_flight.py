"""torch's flight recorder: switched on, and read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from leanmill.parallel import flight
from leanmill.parallel.flight import Standing, standings_of


ALL = "all ranks"


def test_the_flight_recorder_is_switched_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT")
    files = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    for name in (*names, *files):
        monkeypatch.setenv(name, "")  # so that teardown takes away what is set below
        monkeypatch.delenv(name)
    monkeypatch.setattr(flight.tempfile, "gettempdir", lambda: str(tmp_path))
    prefix = flight.start_recorder(is_dumped=True)
    assert Path(prefix).parent.is_dir()
    assert {os.environ[name] for name in files} == {prefix}
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert int(os.environ["TORCH_FR_BUFFER_SIZE"]) > 0


def test_gloo_alone_needs_one_variable_and_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(flight.tempfile, "gettempdir", lambda: str(tmp_path))
    flight.start_recorder(is_dumped=False)
    # The other name is deprecated, which torch would say on every rank.
    assert int(os.environ["TORCH_FR_BUFFER_SIZE"]) > 0
    assert "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ
    assert not any(tmp_path.iterdir())


def entry(
    backend: str, number: int, *, retired: bool, record: int, group: tuple[str, str] = ("0", "default_pg")
) -> dict[str, object]:
    return {
        "record_id": record,
        "collective_seq_id": number,
        "process_group": list(group),
        "profiling_name": f"{backend}:all_gather",
        "input_sizes": [[2, 3]],
        "retired": retired,
        "state": "scheduled",
        "is_p2p": False,
    }


def test_where_gloo_and_nccl_are() -> None:
    # NCCL has asked for number 3 while 2 is still under way.
    nccl = [entry("nccl", number, retired=number < 2, record=number) for number in (1, 2, 3)]
    assert standings_of({"entries": nccl[::-1]}) == {
        ALL: Standing(number=2, operation="all_gather", sizes=((2, 3),), is_done=False)
    }
    # gloo never closes its record of an all-to-all; the last call is where it is.
    gloo = [entry("gloo", number, retired=number != 2, record=number) for number in (1, 2, 3)]
    gloo.append(entry("gloo", 1, retired=False, record=4, group=("5", "mesh_ep")))
    found = standings_of({"entries": gloo})
    assert found[ALL].number == 3
    assert found[ALL].is_done
    assert found["mesh_ep 5"] == Standing(number=1, operation="all_gather", sizes=((2, 3),), is_done=False)
    assert standings_of({}) == {}
