"""`leanmill check --parity`: what it says, and that it fails where ranks train another model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from leanmill.cli.main import main
from leanmill.trainer.parity import check
from leanmill.trainer.parity.ranks import traced_alone
from leanmill.trainer.parity.trace import Trace


RECIPE = """
model: {config: {model_type: llama, hidden_size: 512, num_attention_heads: 8, num_hidden_layers: 12}}
techniques: [{type: ternary}]
engine: ENGINE
train: {total_tokens: 1000000, activation_checkpointing: full}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], str]:
    def write(engine: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.replace("ENGINE", engine))
        return str(path)

    return write


def test_wrong_gradients_fail(
    recipe: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def doubled(small: Any, world_size: int, dtype: torch.dtype, *, packed: bool) -> list[Trace]:
        single = small.model_copy(update={"engine": check.SingleEngine()})
        # One process takes the micro-batches of both ranks.
        size = small.batch.tokens_per_micro_batch * world_size
        single = single.model_copy(update={"batch": small.batch.model_copy(update={"tokens_per_micro_batch": size})})
        found = traced_alone(single, dtype, packed=packed)
        for gradients in found.gradients:
            for name in gradients:
                if "self_attn" in name:
                    gradients[name] = 2 * gradients[name]
        return [found] * world_size

    monkeypatch.setattr(check, "traced_together", doubled)
    assert main(["check", "--parity", recipe("ddp")]) == 1
    said = capsys.readouterr().out
    assert "step 1, gradient of attention: off by 1.0e+00, ratio 2: scaled by data ranks" in said
    assert "gradient of mlp" not in said
    assert "ddp, 2 ranks, float64: the ranks train another model than one process" in said


def test_one_process_has_nothing_to_compare(recipe: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--parity", recipe("single")]) == 2
    assert "nothing to compare; add engine=ddp or" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "{type: fsdp, shard_size: 2}", "{type: deepspeed, stage: 3}"])
def test_ranks_are_started_and_compared(
    engine: str, recipe: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--parity", recipe(engine)]) == 0
    said = capsys.readouterr().out
    assert said.count("the ranks train what one process trains") == (2 if engine == "auto" else 1)
    assert ("4 ranks" in said) == ("shard_size" in engine)
