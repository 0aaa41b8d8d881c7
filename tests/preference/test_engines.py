"""Losses over pairs train alike on one process and on two ranks, with either kind of reference."""

import os

import pytest
import torch

from leanmill.parallel.launch import Ranks
from leanmill.recipe.root import Recipe
from tests.contract_cases import ENGINES
from tests.contract_training import full_parameters, recipe_of, save_teacher, train
from tests.distributed import run_ranks
from tests.preference.pairs import rows


NUM_ROWS, LENGTH = 8, 37
CASES = {
    "dpo": [
        {"type": "dpo", "beta": 0.5, "chosen_weight": 0.1},
        {"type": "lora", "rank": 4, "alpha": 8},
        {"type": "ternary"},
    ],
    "dpo beside branches": [{"type": "dpo", "beta": 0.5}, {"type": "lora", "rank": 4, "where": "branch"}],
    "kto": [{"type": "kto", "beta": 0.5, "reference": "TEACHER"}],
}


class PairRows:
    """Rows of pairs in one order; both micro-batches of a step hold the same rows, whatever the number of ranks."""

    def __init__(self, num_pieces: int) -> None:
        parts = [rows(num_pieces, length=LENGTH, seed=seed) for seed in range(NUM_ROWS)]
        self.rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.position_tokens = 0

    def next_rows(self, num_rows: int, *, rank: int, world_size: int) -> dict[str, torch.Tensor]:
        first = self.position_tokens // LENGTH
        self.position_tokens += num_rows * LENGTH
        part = torch.arange(first, first + num_rows).view(2, world_size, -1)[:, rank].flatten()
        return {name: value[part] for name, value in self.rows.items()} | {"row_ids": part}


def recipe(case, engine, teacher, world_size):
    raw = recipe_of((), engine, teacher, 1).model_dump(mode="json")
    raw["techniques"] = [
        {key: teacher if value == "TEACHER" else value for key, value in one.items()} for one in CASES[case]
    ]
    source = {"type": "hf", "path": "pairs.jsonl"}
    mismatched = {"mismatched_answers": case == "kto"}
    raw["data"] = {"sequence_length": LENGTH, "task": "preference", "source": source, **mismatched}
    tokens = NUM_ROWS * LENGTH
    raw["batch"] = {"tokens_per_step": tokens, "tokens_per_micro_batch": tokens // (2 * world_size)}
    raw["train"] |= {"cross_entropy_weight": 0.0}
    return Recipe.model_validate(raw)


def trained(engine, teacher, ranks, cases):
    found = {}
    for case in cases:
        one = recipe(case, engine, teacher, ranks.world_size)
        live, loop = train(one, ranks, num_steps=3, data=PairRows(one.data.num_pieces))
        metrics = {key: value for rule in loop.step_rules for key, value in rule.metrics().items()}
        found[case] = full_parameters(live), metrics
        live.close()
    return found


def _on_two_ranks(engine, teacher, cases):
    rank = int(os.environ["RANK"])
    ranks = Ranks(rank=rank, world_size=2, local_rank=rank, device=torch.device("cpu"))
    return trained(engine, teacher, ranks, cases)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize(
    "engine", [name if name == "fsdp" else pytest.param(name, marks=pytest.mark.slow) for name in ENGINES]
)
def test_two_ranks_equal_one_process(engine, teacher):
    one = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    cases = [case for case in CASES if engine != "fsdp" or case != "dpo beside branches"]
    expected = trained({"type": "single"}, teacher, one, cases)
    for got in run_ranks(_on_two_ranks, 2, ENGINES[engine], teacher, cases):
        for case in cases:
            for name, value in expected[case][0].items():
                torch.testing.assert_close(got[case][0][name], value, rtol=1e-5, atol=2e-6, msg=f"{case}: {name}")
            assert got[case][1] == pytest.approx(expected[case][1], abs=1e-4)


def test_it_learns_to_prefer_the_chosen(teacher):
    one = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    raw = recipe("dpo", {"type": "single"}, teacher, 1)
    data = PairRows(2)
    data.rows = {name: value[:NUM_ROWS].repeat(3, *[1] * (value.dim() - 1)) for name, value in data.rows.items()}
    _, loop = train(raw, one, num_steps=3, data=data)
    assert loop.step_rules[-1].metrics()["margin"] > 0.05
