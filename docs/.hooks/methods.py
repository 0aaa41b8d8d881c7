"""The table of methods and the engines that each is trained under, made when the site is built.

Methods are those of the registry. An engine has a mark where the contract test, or a test of the method's own, trains
the method there on two ranks and finds the weights of one process; the tests' table of cases is what is read here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from leanmill.core.registry import PASSES, TECHNIQUES, Entry


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.contract_cases import (  # noqa: E402
    ENGINES,
    EXTRA_TECHNIQUES,
    is_refused,
)
from tests.contract_cases import TECHNIQUES as CASES  # noqa: E402
from tests.contract_combinations import BF16_COMBINATIONS, COMBINATIONS, SLOW_COMBINATIONS  # noqa: E402


FAMILIES, METHODS, PASS_TABLE = "<!-- families x engines -->", "<!-- methods x engines -->", "<!-- passes -->"
"""Lines of pages that tables take the place of."""
NAMES = {"ddp": "DDP", "fsdp": "FSDP2", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
"""Headings of the contract's engines; one process is beside them in each."""
ROOMS = {
    "sparse": "sparse weights",
    "quant": "few bits",
    "peft_ext": "adapters, what trains",
    "distill": "distillation",
    "moe": "mixtures of experts",
    "architecture": "architecture, noise",
    "preference": "preferences",
    "sentences": "sentence encoders",
}
"""Folders of techniques, by what they are about."""
OWN_TESTS = {
    "dpo": "tests/preference/test_engines.py",
    "kto": "tests/preference/test_engines.py",
    "contrastive": "tests/sentences/test_engines.py",
    "embedding_distill": "tests/sentences/test_engines.py",
}
"""Tests over all of the contract's engines, of techniques that need data of their own."""
TRAINED, REFUSED, UNKNOWN = "yes", "refused", "not compared"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the tables where a page asks for them."""
    up = "../" * page.file.src_uri.count("/")
    for mark, lines in ((FAMILIES, families), (METHODS, methods), (PASS_TABLE, passes)):
        if mark in markdown:
            markdown = markdown.replace(mark, "\n".join(lines(up)))
    return markdown


def engines_of(name: str) -> dict[str, str]:
    """What is known of a technique under each engine of the contract, by the engine's name there."""
    if name in OWN_TESTS:
        return dict.fromkeys(ENGINES, TRAINED)
    cases = {case for case, config in (CASES | EXTRA_TECHNIQUES).items() if config["type"] == name}
    combinations = [
        names
        for of in (COMBINATIONS, SLOW_COMBINATIONS, BF16_COMBINATIONS)
        for names in of.values()
        if cases & set(names)
    ]
    return {engine: _known(config, combinations) for engine, config in ENGINES.items()}


def _known(engine: Mapping[str, Any], combinations: Iterable[tuple[str, ...]]) -> str:
    refused = [is_refused(dict(engine), names) for names in combinations]
    if not refused:
        return UNKNOWN
    return REFUSED if all(refused) else TRAINED


def room_of(entry: Entry) -> str:
    """The folder of a technique."""
    return entry.target.split(".")[1]


def methods(up: str) -> Iterator[str]:
    """One row a technique."""
    yield f"| technique | what it does | one process | {' | '.join(NAMES[engine] for engine in ENGINES)} |"
    yield "|---|---|---|" + "---|" * len(ENGINES)
    for name, entry in TECHNIQUES.items():
        marks = " | ".join(engines_of(name).values())
        yield f"| [`{name}`]({up}techniques/{name}.md) | {entry.summary.replace('|', chr(92) + '|')} | yes | {marks} |"


def families(up: str) -> Iterator[str]:
    """One row a folder of techniques, the stages of ZeRO in one column."""
    columns = {"DDP": ["ddp"], "FSDP2": ["fsdp"], "ZeRO-1, 2, 3": ["zero1", "zero2", "zero3"]}
    yield f"| what | techniques | {' | '.join(columns)} |"
    yield "|---|---|" + "---|" * len(columns)
    for room, what in ROOMS.items():
        known = {name: engines_of(name) for name, entry in TECHNIQUES.items() if room_of(entry) == room}
        links = ", ".join(f"[{name}]({up}techniques/{name}.md)" for name in known)
        yield f"| {what} | {links} | {' | '.join(_of_family(known, engines) for engines in columns.values())} |"


def _of_family(known: Mapping[str, Mapping[str, str]], engines: Iterable[str]) -> str:
    others = [name for name, marks in known.items() if {marks[engine] for engine in engines} != {TRAINED}]
    return f"all but {', '.join(others)}" if others else "yes"


def passes(up: str) -> Iterator[str]:
    """One row a pass."""
    yield "| pass | what it does | paper |"
    yield "|---|---|---|"
    for name, entry in PASSES.items():
        yield f"| `{name}` | {entry.summary.replace('|', chr(92) + '|')} | {entry.paper} |"
