"""A pytest plugin that puts our tuners into the tables of PEFT's own tests, and keeps nothing else of them.

Loaded by `-p plugin` beside an unpacked source distribution of PEFT. Tables are lists of its test modules, read when
tests are collected, so they are changed in place before.
"""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from cases import DEPARTURES, LAYERS, SAME_AND_DIFFERENT, STRONGER, TUNERS, UNMERGEABLE
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType

import leanmill.peft_ext  # noqa: F401 (registers)


MODELS = {
    "test_decoder_models": ("PEFT_DECODER_MODELS_TO_TEST", "CAUSAL_LM", ("llama", "opt")),
    "test_encoder_decoder_models": ("PEFT_ENCODER_DECODER_MODELS_TO_TEST", "SEQ_2_SEQ_LM", ("t5",)),
    "test_feature_extraction_models": ("PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST", "FEATURE_EXTRACTION", ("bert",)),
    "test_seq_classifier": ("PEFT_SEQ_CLS_MODELS_TO_TEST", "SEQ_CLS", ("bert",)),
}
"""Modules of tests over whole models: their table of models, the task, and the folders that take the models' place."""

_outcomes: dict[str, Counter[str]] = {}
_skips: dict[str, Counter[str]] = {}


def config_of(name: str) -> Any:
    """The configuration class of a tuner."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name.upper())]


WANTED = os.environ.get("PEFT_SUITE_TUNERS", " ".join(TUNERS)).split()
CLASSES = {config_of(name): name for name in WANTED}


def pytest_collection(session: pytest.Session) -> None:
    for path in session.config.args:
        module = importlib.import_module(f"tests.{Path(path).stem}")
        _tell_what_merges(module)
        {"test_custom_models": _custom, "test_config": _configs}.get(Path(path).stem, _models)(module)


def _tell_what_merges(module: Any) -> None:
    """Have tests stop where PEFT's own stop for its methods that cannot be merged."""
    common = importlib.import_module("tests.testing_common")
    pefts_own = common._skip_if_merging_not_supported

    def skip_if_not_supported(model_id: str, config_cls: Any, config_kwargs: Any) -> None:
        reason = UNMERGEABLE.get(CLASSES.get(config_cls, ""))
        if reason is not None:
            pytest.skip(reason)
        pefts_own(model_id, config_cls, config_kwargs)

    for asked in (common, module):
        asked._skip_if_merging_not_supported = skip_if_not_supported


def _custom(module: Any) -> None:
    module.ALL_PEFT_CONFIG_CLASSES[:] = list(CLASSES)
    set_ups = [(f"{name} {kind}", config_of(name), own) for name in WANTED for kind, own in TUNERS[name].items()]
    module.TEST_CASES[:] = [
        (f"Vanilla MLP {number} {label}", "MLP", config, {**own, **layers})
        for label, config, own in set_ups
        for number, layers in LAYERS.items()
    ]
    module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
        (
            f"{label} {where}",
            CLASSES[config],
            config,
            *(
                {**own, **STRONGER.get(CLASSES[config], {}), "target_modules": [layer], "init_weights": False}
                for layer in layers
            ),
        )
        for label, config, own in set_ups
        for where, layers in SAME_AND_DIFFERENT.items()
    ]


def _models(module: Any) -> None:
    table, task, models = MODELS[module.__name__.rpartition(".")[2]]
    folder = Path(os.environ["PEFT_SUITE_MODELS"])
    getattr(module, table)[:] = [str(folder / task.lower() / model) for model in models]
    module.ALL_CONFIGS[:] = [
        (config_of(name), {"task_type": task, "target_modules": None, **own, **STRONGER.get(name, {})})
        for name in WANTED
        for own in TUNERS[name].values()
    ]


def _configs(module: Any) -> None:
    """The table is a tuple, so the marks that hold it are made anew."""
    rows = [(config, {}) for config in CLASSES]
    for test in vars(module.TestPeftConfig).values():
        marks = getattr(test, "pytestmark", [])
        for index, mark in enumerate(marks):
            if mark.name == "parametrize" and mark.args[1] in (
                module.ALL_CONFIG_CLASSES,
                module.LAYER_INDEXING_CONFIG_CLASSES,
            ):
                marks[index] = pytest.mark.parametrize(mark.args[0], rows).mark


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if _tuner(item) is not None]
    for item in items:
        name, set_up, test = _tuner(item), _set_up(item), getattr(item, "originalname", "")
        for whose, which, tests, reason in DEPARTURES:
            if whose == name and set_up in which and any(fnmatchcase(test, pattern) for pattern in tests):
                item.add_marker(pytest.mark.skip(reason=reason))
                break


def _tuner(item: pytest.Item) -> str | None:
    """The tuner that a test is given."""
    given = getattr(getattr(item, "callspec", None), "params", {}).values()
    return next((CLASSES[value] for value in given if isinstance(value, type) and value in CLASSES), None)


def _set_up(item: pytest.Item) -> str | None:
    """The set-up of the tuner that a test is given; None where it takes the defaults of its class."""
    given = getattr(getattr(item, "callspec", None), "params", {}).get("config_kwargs", {})
    known = TUNERS[_tuner(item) or ""]
    return next((kind for kind, own in known.items() if own.keys() <= given.keys() and _is_set_up(own, given)), None)


def _is_set_up(own: dict[str, Any], given: dict[str, Any]) -> bool:
    return all(given[key] == value for key, value in own.items() if key != "alpha")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report: pytest.TestReport = yield
    name = _tuner(item) or "?"
    if report.when == "call" or report.outcome != "passed":
        _outcomes.setdefault(name, Counter())[report.outcome] += 1
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            _skips.setdefault(name, Counter())[report.longrepr[2].removeprefix("Skipped: ").split(" for ")[0]] += 1
    return report


def pytest_sessionfinish() -> None:
    found = {name: {**counts, "reasons_of_skips": dict(_skips.get(name, {}))} for name, counts in _outcomes.items()}
    Path(os.environ["PEFT_SUITE_COUNTS"]).write_text(json.dumps(found))
