"""The report of a run that goes on."""

from __future__ import annotations

import http.client
import threading
from contextlib import contextmanager

import pytest

from leanmill.report.live import server
from tests.report.page.test_compare import write_run


@contextmanager
def served(run_dir, *, is_training):
    with server(run_dir, port=0, refresh_seconds=7, is_training=lambda: is_training) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            found.shutdown()
            thread.join()


def get(found, path="/", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", found.server_port, timeout=30)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{found.server_port}"})
    answer = connection.getresponse()
    return answer, answer.read().decode()


@pytest.fixture
def going_on(tmp_path):
    folder = write_run(tmp_path / "run", name="mine", lr=1e-3, losses=[3.0, 2.5])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    return folder


def test_a_page_of_a_run_that_goes_on_loads_itself_again_with_what_is_new(going_on):
    with served(going_on, is_training=True) as found:
        answer, page = get(found)
        assert (answer.status, answer.getheader("Refresh")) == (200, "7")
        assert "running" in page
        with (going_on / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "end", "status": "finished", "time": 4000.0}\n')
        answer, page = get(found)
        assert answer.getheader("Refresh") is None
        assert "finished" in page


def test_a_run_whose_process_is_gone_is_said_to_be(going_on):
    with served(going_on, is_training=False) as found:
        answer, page = get(found)
    assert answer.getheader("Refresh") is None
    assert "No process trains this run" in page


def test_answers_this_machine_alone_and_one_page(going_on):
    with served(going_on, is_training=True) as found:
        assert found.server_address[0] == "127.0.0.1"
        assert get(found, host="evil.example")[0].status == 403
        assert get(found, "/../recipe.yaml")[0].status == 404
