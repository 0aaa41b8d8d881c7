"""Tables of latencies that ranks agree on."""

from types import SimpleNamespace

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.sparse.structured.timing import is_there, least_times, mean_of_ranks


def test_times_are_of_each_job_and_means_of_ranks():
    calls = []
    times = least_times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, torch.device("cpu"))
    assert calls.count("a") == calls.count("b") > 1
    two = SimpleNamespace(total=lambda own: own + torch.tensor([1.0, 3.0, 1.0]))
    assert mean_of_ranks(two, {"a": 3.0, "b": 5.0}) == {"a": 2.0, "b": 4.0}
    assert times.keys() == {"a", "b"}


def test_a_table_that_some_machines_lack_is_refused_by_all(tmp_path):
    def with_another(sees):
        return SimpleNamespace(total=lambda own: own + torch.tensor([float(sees), 1.0]))

    table = tmp_path / "table.json"
    assert not is_there(with_another(sees=False), str(table), "ziplm")
    with pytest.raises(ConfigError, match="is on some machines and not on others; copy it to all of them"):
        is_there(with_another(sees=True), str(table), "ziplm")
    table.write_text("{}")
    assert is_there(with_another(sees=True), str(table), "ziplm")
    with pytest.raises(ConfigError, match="copy it to all of them"):
        is_there(with_another(sees=False), str(table), "ziplm")
