"""One thread a process: ranks and test workers share few cores, and oversubscription is the big cost."""

import gc
import logging
import os
import signal
import sys
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


if not torch.cuda.is_available():
    # Triton's own functions (tl.zeros, tl.sum) decide at its first import whether they can be
    # interpreted, and many libraries import it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)


# A shell without job control starts background jobs with interrupts ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Tests that run in one worker come first, so that the other one is not done long before."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


def pytest_collection_finish():
    """Modules and tests stay: collecting garbage among them all would take a second each time."""
    gc.freeze()


def pytest_unconfigure():
    """Some libraries count, at the end, what nobody has freed."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_log_level():
    """The command line sets the level at which the project speaks, for the rest of the process."""
    logger = logging.getLogger("leanmill")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture(autouse=True)
def _skip_without_gpu(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """A folder of this test's own where transformers puts models' Python files and imports them from."""
    folder = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    # Another test's would be looked into first.
    others = [path for path in sys.path if not (Path(path) / "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", others)
    yield folder
    # The next test's are not found beneath a package of this one's.
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]
