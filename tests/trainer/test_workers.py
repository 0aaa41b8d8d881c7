"""Runs whose workers step without each other: resumed between two exchanges, with other numbers of workers, refused."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.checkpoint.reading import read_full_state
from leanmill.cli.main import main
from leanmill.recipe.root import Recipe
from leanmill.trainer.loop import Loop
from leanmill.trainer.processes import processes
from leanmill.trainer.run import run_in
from tests.data.samples import write_texts
from tests.distributed import run_ranks


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    write_texts(folder / "a.jsonl", 60)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=300, num_key_value_heads=1, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    return folder


def recipe_of(home: Path, run_dir: Path, techniques: Any = (), engine: str = "single", **changes: Any) -> Recipe:
    raw: dict[str, Any] = {
        "run_dir": str(run_dir),
        "device": "cpu",
        "model": {"path": str(home / "model")},
        "data": {
            "source": {"type": "hf", "path": str(home / "a.jsonl"), "validation_fraction": 0.3},
            "tokenizer": {"vocab_size": 300},
            "sequence_length": 16,
            "cache_dir": str(home / "cache"),
        },
        "techniques": list(techniques),
        "engine": engine,
        "layout": {"low_comm": {"type": "diloco", "workers": 2, "every_steps": 3}},
        "batch": {"tokens_per_step": 128, "tokens_per_micro_batch": 32},
        "train": {"steps": 5, "precision": "fp32", "deterministic": True},
        "optimizer": {"type": "adamw", "lr": 0.01},
        "eval": {"every_steps": 3, "tokens_per_domain": 32},
        "checkpoint": {"every_steps": 4},
        "log": {"every_steps": 1, "tensorboard": False, "report": False},
        "cluster": {"hang_seconds": None},
    }
    for section, values in changes.items():
        raw[section] = {**raw[section], **values}
    return Recipe.model_validate(raw)


def _go_on(source: Path, target: Path, step: int) -> None:
    """Let a run of another folder begin at a checkpoint."""
    shutil.copytree(source / f"checkpoints/step-{step:08d}", target / f"checkpoints/step-{step:08d}")


def _state(run_dir: Path, step: int = 5) -> dict[str, Tensor]:
    folder = run_dir / f"checkpoints/step-{step:08d}"
    return {
        f"{part}/{name}": value
        for part in ("model", "optimizer", "outer", "workers")
        for name, value in read_full_state(folder, part).items()  # type: ignore[arg-type]
    }


TECHNIQUES = [{"type": "nm_sparsity"}, {"type": "ternary"}]
DILOCO = {"type": "diloco", "workers": 2, "every_steps": 3}
CO2 = {"type": "co2", "workers": 2, "every_steps": 3}
STREAMING = {"type": "streaming_diloco", "workers": 2, "every_steps": 3, "layers_per_fragment": 1, "overlap_steps": 1}


@pytest.mark.parametrize(
    ("low_comm", "engine", "techniques", "num_ranks"),
    [
        (STREAMING, "single", TECHNIQUES, 2),
        pytest.param(STREAMING, "fsdp", TECHNIQUES, 4, marks=pytest.mark.slow),
        pytest.param(CO2, "fsdp", TECHNIQUES, 4, marks=pytest.mark.slow),
        pytest.param(DILOCO, "single", [{"type": "lora", "rank": 2}], 2, marks=pytest.mark.slow),
        pytest.param(DILOCO, "ddp", TECHNIQUES, 4, marks=pytest.mark.slow),
    ],
)
def test_a_resume_between_two_exchanges_is_bitwise(
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    low_comm: dict[str, Any],
    engine: str,
    techniques: Any,
    num_ranks: int,
) -> None:
    layout = {"low_comm": low_comm}
    whole, resumed = (
        recipe_of(home, tmp_path / name, techniques, engine, layout=layout) for name in ("whole", "resumed")
    )

    def body() -> list[int]:
        with processes(whole) as given, pytest.MonkeyPatch.context() as patch:
            numbers: list[int] = []
            step = Loop.train_step

            def counted(loop: Loop) -> None:
                numbers.append(dist.group.WORLD._get_sequence_number_for_group())  # type: ignore[union-attr]
                step(loop)

            patch.setattr(Loop, "train_step", counted)
            run_in(given, whole)
            found = [later - earlier for earlier, later in itertools.pairwise(numbers)]
            if given.ranks.rank == 0:
                _go_on(tmp_path / "whole", tmp_path / "resumed", 4)
            run_in(given, resumed)
            return found

    for found in run_ranks(body, num_ranks):
        # After the first step time-outs change, and after the third all ranks evaluate.
        assert num_ranks == 2 or found[1] == 0 < min(found[0], found[2])
    expected, found = _state(tmp_path / "whole"), _state(tmp_path / "resumed")
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
    between = _state(tmp_path / "whole", 4)
    name = next(name.removeprefix("workers/0/model/") for name in between if name.startswith("workers/0/model/"))
    mine, other = (between[f"workers/{worker}/model/{name}"] for worker in (0, 1))
    assert not torch.equal(mine, other)
    assert not torch.equal(mine, between[f"model/{name}"])
    # At the end all have met.
    assert torch.equal(expected[f"workers/1/model/{name}"], expected[f"model/{name}"])
    assert main(["ckpt", "inspect", str(tmp_path / "whole" / "checkpoints/step-00000004")]) == 0
    assert {"model", "optimizer", "outer", "workers"} <= set(re.findall(r"^(\w+): ", capsys.readouterr().out, re.M))
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert any("low_comm/sent_bytes" in str(line) for line in lines)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": {"type": "deepspeed"}}, "type engine=ddp or engine=fsdp"),
        ({"train": {"non_finite": "skip"}}, "set train.non_finite=stop"),
        ({"train": {"spike": {}}}, "set train.spike=null"),
        ({"eval": {"every_steps": 4}}, "set eval.every_steps=3 or 6"),
        ({"layout": {"ep": 2}}, "share experts"),
        ({"techniques": [{"type": "rigl"}]}, "rigl has not been shown to hold where workers step alone"),
    ],
)
def test_what_needs_all_ranks_in_a_step_is_refused(
    home: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    raw = recipe_of(home, tmp_path).model_dump(mode="json")
    for key, value in changes.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) and key != "engine" else value
    with pytest.raises(Exception, match=said):
        Recipe.model_validate(raw)
