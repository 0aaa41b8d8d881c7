"""A leading `~` means the home folder, or is refused in words."""

from pathlib import Path

import pytest

from leanmill.core.errors import ConfigError
from leanmill.core.paths import expand_user


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert expand_user("~/model") == Path("/somewhere/model")
    assert expand_user("org/model") == Path("org/model")


def test_an_unknown_home_is_refused_with_a_remedy():
    with pytest.raises(ConfigError, match="'~nobody-of-that-name/model': .*write the whole path"):
        expand_user("~nobody-of-that-name/model")
