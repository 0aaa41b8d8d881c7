"""Ranks wait for each other with a word, and give up with a remedy."""

from __future__ import annotations

import logging
import socket
import threading
import time

import pytest
import torch.distributed as dist

from leanmill.core.errors import ConfigError, RunError
from leanmill.parallel import meeting
from leanmill.parallel.meeting import Meeting


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = int(probe.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(meeting, "NOTICE_SECONDS", 0.2)
    return port


def _meeting(rank: int, world_size: int = 2, timeout_seconds: float = 1.0) -> Meeting:
    return Meeting(rank=rank, world_size=world_size, local_rank=rank, timeout_seconds=timeout_seconds)


def test_the_first_notice_comes_within_ten_seconds() -> None:
    assert meeting.NOTICE_SECONDS + meeting._CONNECT_SECONDS <= 10


def test_a_missing_rank_is_named_and_given_up(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(RunError) as caught:
        _meeting(0).join()
    assert f"waiting for 1 of 2 ranks at localhost:{port} (missing: 1)" in caplog.messages
    # At 0.2, 0.4 and 0.8 s of 1 s: a long wait does not fill the log.
    assert 2 <= len(caplog.messages) <= 3
    assert "given up after 1 s" in str(caught.value)
    assert "cluster.init_timeout_seconds" in str(caught.value)


def test_a_missing_host_is_named_and_given_up(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(RunError, match="nothing answered at localhost"):
        _meeting(1).join()
    assert f"waiting for rank 0 at localhost:{port}: nothing answers there" in caplog.messages


def test_ranks_that_are_all_there_say_nothing(port: int, caplog: pytest.LogCaptureFixture) -> None:
    stores: dict[int, dist.Store] = {}
    threads = [
        threading.Thread(target=lambda r=rank: stores.update({r: _meeting(r, 3, 20.0).join()})) for rank in (2, 1, 0)
    ]
    with caplog.at_level(logging.WARNING):
        for thread in threads:
            thread.start()
            time.sleep(0.03)
        for thread in threads:
            thread.join()
    assert caplog.messages == []
    stores[0].set("word", "from 0")
    assert {rank: store.get("word") for rank, store in stores.items()} == dict.fromkeys(range(3), b"from 0")


def test_one_rank_of_a_machine_gives_the_notice(port: int, caplog: pytest.LogCaptureFixture) -> None:
    def wait(rank: int) -> None:
        with pytest.raises(RunError):
            _meeting(rank, 3).join()

    threads = [threading.Thread(target=wait, args=(rank,), name=f"rank-{rank}") for rank in (0, 1)]
    with caplog.at_level(logging.WARNING):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {record.threadName for record in caplog.records} == {"rank-0"}


def test_a_taken_port_is_a_config_error(port: int) -> None:
    with socket.socket() as other:
        other.bind(("localhost", port))
        other.listen()
        with pytest.raises(ConfigError, match=r"rank 0 cannot listen at localhost:.* free port"):
            _meeting(0).join()


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_no_address_is_a_config_error(port: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    with pytest.raises(ConfigError, match="start with torchrun"):
        _meeting(0)
