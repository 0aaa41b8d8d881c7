"""A run's report while it goes on, served to this machine alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from leanmill.report.page.data import RunData, load_run
from leanmill.report.page.html import render


HOST = "127.0.0.1"


def server(run_dir: Path, *, port: int, refresh_seconds: int, is_training: Callable[[], bool]) -> ThreadingHTTPServer:
    """Return a server of the report, made anew at each request; the caller runs and closes it.

    The page asks to be loaded again every `refresh_seconds` until the run ends. Only requests that name this machine
    are answered, so that no page of another site reads the report through a name that leads here.

    Args:
        run_dir: Of the run.
        port: To listen on at 127.0.0.1; 0 takes a free one.
        refresh_seconds: Between two loads.
        is_training: Whether a process trains the run now.

    Raises:
        OSError: The port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if (self.headers.get("Host") or "").partition(":")[0] not in (HOST, "localhost"):
                self.send_error(403, "this report is for this machine")
                return
            if self.path.partition("?")[0] != "/":
                self.send_error(404)
                return
            run = as_it_is(load_run(run_dir), is_training=is_training())
            page = render(run).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Cache-Control", "no-store")
            if run.status == "running":
                self.send_header("Refresh", str(refresh_seconds))
            with suppress(ConnectionError):  # a reader that has left
                self.end_headers()
                self.wfile.write(page)

        def log_message(self, *_: Any) -> None:
            """Requests of a page that loads itself are no news."""

    return ThreadingHTTPServer((HOST, port), Handler)


def as_it_is(run: RunData, *, is_training: bool) -> RunData:
    """Return the run with the state it is in: one whose process is gone without a word does not go on."""
    if run.status != "running" or is_training:
        return run
    said = "No process trains this run: it was killed, or has not begun. The same command continues it."
    return replace(run, status="stopped", message=run.message or said)
