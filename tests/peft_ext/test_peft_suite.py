"""What PEFT's own tests say of our tuners, as `make peft-suite` left it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from leanmill.peft_ext.registration import TUNERS


ROOT = Path(__file__).resolve().parents[2]


def test_every_tuner_passes_what_it_is_given():
    cases = runpy.run_path(str(ROOT / "benchmarks" / "peft_suite" / "cases.py"))
    result = json.loads((ROOT / "benchmarks" / "results" / "peft_suite.json").read_text())
    assert result["tuners"].keys() == TUNERS.keys() == cases["TUNERS"].keys()
    for name, counts in result["tuners"].items():
        assert counts["failed"] == 0, name
        assert counts["passed"] > 280 * len(cases["TUNERS"][name]) > 2 * counts["skipped"], name
