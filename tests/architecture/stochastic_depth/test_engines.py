from __future__ import annotations

import torch
import torch.distributed as dist

from leanmill.parallel.launch import Ranks
from tests.contract_cases import ENGINES
from tests.contract_training import train_combinations
from tests.distributed import run_ranks


COMBINATIONS = {"dropped_steps": ("dropped_steps",), "with others": ("dropped_steps", "ternary", "lora")}


def test_dropping_by_batch_on_two_ranks_equals_one_process_where_it_is_allowed():
    def train():
        ranks = Ranks(rank=dist.get_rank(), world_size=2, local_rank=dist.get_rank(), device=torch.device("cpu"))
        engines = {name: engine for name, engine in ENGINES.items() if name != "zero3"}
        return {name: train_combinations(engine, "", ranks, COMBINATIONS) for name, engine in engines.items()}

    one = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    expected = train_combinations({"type": "single"}, "", one, COMBINATIONS)
    for name, results in run_ranks(train, 2)[0].items():
        for combination, parameters in expected.items():
            for key, value in parameters.items():
                got = results[combination][key]
                torch.testing.assert_close(
                    got, value, rtol=1e-4, atol=2e-5, msg=lambda m, n=f"{name} {combination} {key}": f"{n}: {m}"
                )
