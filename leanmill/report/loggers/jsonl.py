"""`metrics.jsonl`: one JSON object a line, appended over resumes. Imports no torch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from leanmill.core.errors import RunError
from leanmill.core.redact import redact_tree
from leanmill.report.observer import EvalRecord, Observer, RunInfo, StepRecord
from leanmill.report.records import FILE_NAME, repair


class JsonlLog(Observer):
    """Writes every record as a line with `kind` and `time` (seconds since 1970), flushed at once.

    A resumed run appends a new `start` line. Lines of later steps that the resumed run does again
    stay in the file; `without_superseded` leaves them out.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE_NAME
        self._file: TextIO | None = None
        self._info: RunInfo | None = None
        self._peak: float | None = None

    def on_start(self, info: RunInfo) -> None:
        from leanmill.report.loggers.facts import device_peak, run_facts

        self._info, self._peak = info, device_peak(info)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        repair(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._write("start", run_facts(info))

    def on_step(self, record: StepRecord) -> None:
        from leanmill.report.loggers.facts import utilisation

        assert self._info is not None
        self._write("step", {**asdict(record), "mfu": utilisation(self._info, self._peak, record.tokens_per_second)})

    def on_eval(self, record: EvalRecord) -> None:
        self._write("eval", asdict(record))

    def on_checkpoint(self, step: int, path: Path, seconds_stalled: float) -> None:
        self._write("checkpoint", {"step": step, "path": path.name, "seconds_stalled": seconds_stalled})

    def on_end(self, status: str, message: str = "") -> None:
        if self._file is None:
            return
        # The disk may be what failed: the run's own error must reach the user, not a second one.
        with suppress(RunError) if status == "failed" else nullcontext():
            self._write("end", {"status": status, "message": message})
        with suppress(OSError):
            self._file.close()
        self._file = None

    def _write(self, kind: str, fields: Mapping[str, Any]) -> None:
        assert self._file is not None, "on_start comes first"
        line = {"kind": kind, "time": round(time.time(), 3), **redact_tree(_finite(fields))}
        try:
            self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror}; free space there, then resume") from error


def _finite(value: Any) -> Any:
    """Turn NaN and infinities into None: JSON has neither, and readers choke on them."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
