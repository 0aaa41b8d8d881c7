"""One rank's command line, and how it leaves."""

import subprocess
import sys

from leanmill.cli.rank import parse_args


def test_overrides_stand_anywhere():
    args = parse_args(["a.b=1", "--config", "r.yaml", "c=2", "--debug", "d.e=3"])
    assert args.config == "r.yaml"
    assert args.overrides == ["a.b=1", "c=2", "d.e=3"]
    assert args.debug


def test_leaves_after_flushing_without_teardown():
    code = (
        "import atexit; from leanmill.cli.rank import leave\n"
        "atexit.register(print, 'teardown ran')\n"
        "print('buffered', end=''); leave(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "buffered")
