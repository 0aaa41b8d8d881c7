"""Broken recipes never show internals: exit 0 or 2, in bounded time, each refusal with its place and a remedy."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch

from leanmill.cli.main import main
from leanmill.models.build import build_on_meta
from leanmill.recipe.io import load_recipe
from leanmill.recipe.root import Recipe
from tests.recipe.mutations import Mutant, mutants


NUM_FAST, NUM_SLOW, NUM_TRAINED = 40, 300, 30
MAX_SECONDS = 20
"""A check takes some 0.1 s; this is what a loaded machine may make of it."""
INTERNALS = re.compile(
    r"Traceback|--debug|pydantic|NoneType|object at 0x|instance of|valid dictionary|\[key\]|"
    r"\b(Key|Type|Value|Attribute|Runtime|Recursion|Overflow|ZeroDivision|Index|OS)Error\b"
)
REMEDY = re.compile(
    r"\b(set|give|remove|type|keep|add|correct|choose|use|write|quote|name|shorten|raise|change|see|known|near names|"
    r"did you mean)\b",
    re.IGNORECASE,
)
PLACE = re.compile(r"recipe\.yaml( line \d+)?|override |\b[a-z_]+(\.[a-zA-Z_0-9]+)+|\b[a-z_]+=")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    texts = [f"def f{i}(x):\n    return x + {i * 7 % 13}\n" * (1 + i % 3) for i in range(400)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name folders of their own, and what an earlier run remembers of models is no test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("leanmill.trainer.verdicts.user_cache", lambda: tmp_path / "cache")


def check(mutant: Mutant, files: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Check one recipe; return what is wrong with how it was refused, and `passed` where it was not."""
    path = files / "recipe.yaml"
    path.write_bytes(mutant.text.encode())
    start = time.monotonic()
    try:
        code = main(["check", str(path), *mutant.overrides])
    except SystemExit as error:
        code = int(error.code or 0)
    seconds = time.monotonic() - start
    lines = capsys.readouterr().err.splitlines()
    complaints = [f"took {seconds:.0f} s"] if seconds > MAX_SECONDS else []
    if code == 0:
        return [*complaints, "passed"]
    if code != 2 or not lines:
        complaints.append(f"exit {code} with {len(lines)} lines")
    for line in lines:
        if not line.startswith("error: ") or len(line) > 1200:
            complaints.append(f"no short line: {line}")
        if INTERNALS.search(line):
            complaints.append(f"shows internals: {line}")
        if not REMEDY.search(line) or not PLACE.search(line):
            complaints.append(f"names no place or no remedy: {line}")
    return complaints


def sweep(
    count: int, files: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[list[Mutant], list[tuple[list[str], list[str]]]]:
    """Return the recipes that pass `check`, and (what was done, complaints) of those refused badly."""
    passed, bad = [], []
    for mutant in mutants(count, files):
        complaints = check(mutant, files, capsys)
        if "passed" in complaints:
            complaints.remove("passed")
            passed.append(mutant)
        if complaints:
            bad.append((mutant.story, complaints))
    return passed, bad


def test_40_broken_recipes_are_refused_well(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passed, bad = sweep(NUM_FAST, files, capsys)
    assert not bad
    assert NUM_FAST / 10 < len(passed) < NUM_FAST / 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_300_broken_recipes_are_refused_well_and_what_passes_trains(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passed, bad = sweep(NUM_SLOW, files, capsys)
    with capsys.disabled():
        print(f"\n{NUM_SLOW} recipes: {len(passed)} pass, {NUM_SLOW - len(passed)} refused, {len(bad)} of them badly")
    assert not bad
    tried, failures = 0, []
    for index, mutant in enumerate(passed):
        path = tmp_path / f"{index}.yaml"
        path.write_bytes(mutant.text.encode())
        recipe = load_recipe(path, mutant.overrides)
        if tried == NUM_TRAINED or not runs_here(recipe):
            continue
        tried += 1
        capsys.readouterr()
        code = main(["train", str(path), *mutant.overrides, *short(recipe, tmp_path / f"run-{index}")])
        torch.use_deterministic_algorithms(False)
        if code:
            failures.append((mutant.story, capsys.readouterr().err.splitlines()[-2:]))
    with capsys.disabled():
        print(f"{tried - len(failures)} of {tried} that pass and can run here train", *failures, sep="\n")
    assert tried == NUM_TRAINED
    assert len(failures) <= NUM_TRAINED - 28


def runs_here(recipe: Recipe) -> bool:
    """Whether one CPU process without a network can train the recipe in seconds."""
    if recipe.device == "cuda" or recipe.model.config is None or recipe.train.compile:
        return False
    if recipe.batch.tokens_per_step > 4096 or recipe.data.tokenizer.path or recipe.data.source.type != "hf":
        return False
    if recipe.engine.type not in ("auto", "single") or any(t.frozen_models() for t in recipe.techniques):
        return False
    if not Path(recipe.data.source.path).exists():
        return False
    model = build_on_meta(recipe.model, vocab_size=recipe.data.tokenizer.vocab_size)
    return sum(parameter.numel() for parameter in model.parameters()) < 20e6


def short(recipe: Recipe, run_dir: Path) -> list[str]:
    """Overrides that make a run take two steps and leave its other settings alone."""
    tokens = min(recipe.eval.tokens_per_domain, 4 * recipe.data.sequence_length)
    return [
        f"run_dir={run_dir}",
        "train.steps=2",
        "train.total_tokens=null",
        f"eval.tokens_per_domain={tokens}",
        "log.wandb=false",
    ]
