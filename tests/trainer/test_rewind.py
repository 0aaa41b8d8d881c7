"""Going back: where to, how often, and that what follows is a run like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.checkpoint.reading import read_full_state
from leanmill.cli.main import main
from leanmill.core.errors import RunError
from leanmill.parallel.collectives import max_over_ranks
from leanmill.parallel.single import SingleEngine
from leanmill.parallel.torch_engine import TorchEngine
from leanmill.trainer.loop import Loop
from leanmill.trainer.rewind import RewindError, Rewinds
from tests.distributed import run_ranks


class Saves:
    """Checkpoints by sequence and step; the manager's two questions."""

    def __init__(self, folder: Path, steps: list[int]) -> None:
        self.folder, self.steps = folder, dict(enumerate(steps, start=1))

    def newest_sequence(self) -> int:
        return max(self.steps, default=0)

    def newest_before(self, step: int, *, below: int | None = None) -> Path | None:
        wanted = [n for n, at in self.steps.items() if at < step and (below is None or n < below)]
        return self.folder / str(max(wanted)) if wanted else None


def test_where_a_rewind_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Named:
        def __init__(self, path: Path) -> None:
            self.sequence = int(path.name)

    monkeypatch.setattr("leanmill.trainer.rewind.read_manifest", Named)
    saves, rewinds = Saves(tmp_path, [10, 20, 30]), Rewinds()

    def goes_to(step: int) -> str | None:
        back = rewinds.back(RewindError(step, "a spike", 7), saves)  # type: ignore[arg-type]
        assert back.position_rows == 7
        return None if back.path is None else back.path.name

    assert goes_to(25) == "2"  # one of a later step is not before it
    saves.steps[4] = 30
    assert goes_to(35) == "4"  # one was saved meanwhile, so the last rewind has helped
    assert goes_to(35) == "3"
    assert goes_to(35) == "2"
    with pytest.raises(RunError, match="a spike; 3 rewinds have not got past it"):
        goes_to(35)
    assert Rewinds().back(RewindError(5, "a spike", 7), saves).path is None  # type: ignore[arg-type]


RECIPE = """
name: tiny
run_dir: {run_dir}
device: cpu
model: {{config: {{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1,
                   num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 128}}}}
data:
  sequence_length: 64
  cache_dir: {cache}
  tokenizer: {{vocab_size: 512, num_training_bytes: 100000}}
  source: {{type: local_corpus, max_bytes: 200000, validation_fraction: 0.2}}
techniques: [{{type: nm_sparsity}}]
engine: single
batch: {{tokens_per_step: 512, tokens_per_micro_batch: 256}}
train: {{steps: 10, precision: fp32, deterministic: true, non_finite: rewind,
         spike: {{window_steps: 4, sigmas: 4, action: rewind}}}}
eval: {{every_steps: null, tokens_per_domain: 512}}
checkpoint: {{every_steps: 2, keep_last: 8}}
log: {{every_steps: 1, tensorboard: false, report: false}}
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("norm", [float("nan"), 1e6])
def test_a_run_goes_back_and_past_the_rows_and_resumes_bitwise(
    norm: float, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_row, read = 45, []  # of the sixth step, rows 40 to 47
    next_batch, clip = Loop._next_batch, SingleEngine.clip

    def watched(self: Loop, context: Any) -> Any:
        micro_batches, num_valid = next_batch(self, context)
        read.append((self.step + 1, torch.cat([batch["row_ids"] for batch in micro_batches]).tolist()))
        return micro_batches, num_valid

    def spoilt(self: SingleEngine, max_norm: float | None) -> Tensor:
        found = clip(self, max_norm)
        return torch.full_like(found, norm) if bad_row in read[-1][1] else found

    monkeypatch.setattr(Loop, "_next_batch", watched)
    monkeypatch.setattr(SingleEngine, "clip", spoilt)
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(RECIPE.format(run_dir=run, cache=cache))
    assert main(["train", str(recipe)]) == 0
    steps = [step for step, _ in read]
    assert steps == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 10]
    rows = [row for _, ids in read for row in ids]
    assert rows == list(range(8 * len(steps))), "each row once, and on from where it was known"
    written = capsys.readouterr()
    assert "rewound after" in written.err + written.out
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ends = [record["status"] for record in records if record["kind"] == "end"]
    assert ends == ["rewound", "finished"]
    state = json.loads((run / "checkpoints/step-00000010/train_state.json").read_text())
    assert (state["step"], state["tokens"]) == (10, 12 * 512)

    # A run that is killed afterwards goes on from a checkpoint that has the rows left out.
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints/step-00000010")
    assert main(["train", str(recipe), f"run_dir={again}"]) == 0
    ended, resumed = (read_full_state(folder / "checkpoints/step-00000010") for folder in (run, again))
    assert ended.keys() == resumed.keys()
    assert all(torch.equal(ended[name], resumed[name]) for name in ended)


@pytest.mark.slow
@pytest.mark.parametrize("shares", [False, True], ids=["data", "matmuls"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_ranks_go_back_to_the_same_checkpoint(engine: str, shares: bool, tmp_path: Path, cache: Path) -> None:
    """Ranks that read different data; or that share matmuls and tokens, and read the same."""

    def body() -> tuple[list[int], list[int]]:
        steps, rows = [], []
        next_batch, clip = Loop._next_batch, TorchEngine.clip

        def watched(self: Loop, context: Any) -> Any:
            micro_batches, num_valid = next_batch(self, context)
            steps.append(self.step + 1)
            rows.extend(torch.cat([batch["row_ids"] for batch in micro_batches]).tolist())
            return micro_batches, num_valid

        def spoilt(self: TorchEngine, max_norm: float | None) -> Tensor:
            found = clip(self, max_norm)
            # On the rank that has the row; a norm is the same on all.
            is_bad = max_over_ranks(torch.tensor(float(45 in rows[-(8 if shares else 4) :])))
            return torch.full_like(found, float("nan")) if is_bad else found

        Loop._next_batch, TorchEngine.clip = watched, spoilt  # type: ignore[method-assign]
        recipe = tmp_path / f"recipe-{dist.get_rank()}.yaml"
        recipe.write_text(RECIPE.format(run_dir=tmp_path / "run", cache=cache))
        lisa = "techniques=[{type: lisa, num_layers: 1, every_steps: 2}]"
        length = ["train.steps=null", "train.total_tokens=6144", "batch.tokens_per_micro_batch=128"]
        options = ["layout={tp: 2, sequence_parallel: true}"] if shares else [lisa]
        layers = "model.config.num_hidden_layers=2"
        assert main(["train", str(recipe), f"engine={engine}", layers, *options, *length]) == 0
        return steps, rows

    found = run_ranks(body, 2)
    # Rows that were left out count as read, so that the run has two steps less.
    assert [steps for steps, _ in found] == [[1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 10]] * 2
    if shares:
        assert found[0] == found[1]
    assert sorted(row for _, rows in found[: 1 if shares else 2] for row in rows) == list(range(96))


def test_a_trouble_that_stays_ends_the_run(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = SingleEngine.clip
    monkeypatch.setattr(SingleEngine, "clip", lambda self, max_norm: clip(self, max_norm) * float("nan"), raising=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(run_dir=tmp_path / "run", cache=cache))
    assert main(["train", str(recipe)]) == 1
    assert "in step 1: a second pass over the same rows is finite" in (told := capsys.readouterr().err)
    assert "3 rewinds have not got past it" in told


def test_a_rewind_needs_checkpoints(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(run_dir=tmp_path / "run", cache=cache))
    assert main(["check", str(recipe), "checkpoint.every_steps=null"]) == 2
    told = capsys.readouterr().err
    assert "train.non_finite=rewind and train.spike.action=rewind" in told
    assert "set checkpoint.every_steps" in told
