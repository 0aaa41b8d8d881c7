"""`leanmill completion`."""

import pytest

from leanmill.cli.main import main


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_knows_verbs_and_options(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("leanmill", "export", "--packing", "--gpus-per-node"))
