"""Shares of the rows: which are read in each round, a function of the number alone, and how long a run is."""

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.data.build import build_train_data
from leanmill.data.config import SubsetConfig
from leanmill.data.subset import RowSubset
from leanmill.recipe.root import Recipe
from leanmill.recipe.rules import with_length_in_tokens
from tests.data.samples import hf_config, write_texts


DRAWS = ["without_replacement", "with_replacement", "once"]


@pytest.mark.parametrize("draw", DRAWS)
def test_rounds_hold_what_each_way_of_drawing_says(draw):
    """Of 10 rows 3 a round. A source hands out numbers 10 e to 10 e + 9 as a shuffled pass."""
    subset = RowSubset(SubsetConfig(share=0.39, draw=draw), seed=3)
    assert subset.rows(10) == 3
    rounds = [[subset.number(3 * r + place, 10, source=0) for place in range(3)] for r in range(20)]
    assert all(len({*numbers}) == 3 for numbers in rounds)  # none twice in a round
    if draw == "without_replacement":
        assert sum(rounds, []) == list(range(60))
    if draw == "with_replacement":  # each round the first of a pass of its own, whose order is drawn anew
        assert rounds == [[10 * r + place for place in range(3)] for r in range(20)]
    if draw == "once":
        assert all(sorted(numbers) == [0, 1, 2] for numbers in rounds)
        assert len({tuple(numbers) for numbers in rounds}) > 3
    assert subset.passes(30, 10) == (10 if draw == "once" else 3)


@pytest.mark.parametrize("draw", DRAWS)
def test_rows_are_those_of_all_the_data_and_resume_at_any_number_of_ranks(draw, tmp_path, tokenizer):
    write_texts(tmp_path / "a.jsonl", 60)
    config = hf_config(str(tmp_path / "a.jsonl"), tmp_path)
    every = build_train_data(config, tokenizer, seed=5)
    config = config.model_copy(update={"subset": SubsetConfig(share=0.3, draw=draw)})
    data, again = (build_train_data(config, tokenizer, seed=5) for _ in range(2))
    per_pass, per_round = every.rows_per_epoch, data.rows_per_epoch
    assert per_round == int(0.3 * per_pass) > 1
    assert data.epochs(per_round) == 1
    assert data.fingerprint != every.fingerprint
    rows = data.next_rows(2 * per_round)
    if draw == "without_replacement":
        assert torch.equal(rows["input_ids"], every.next_rows(2 * per_round)["input_ids"])
    first, second = (sorted(map(tuple, part.tolist())) for part in rows["input_ids"].split(per_round))
    assert (first == second) == (draw == "once")
    assert first == sorted(
        map(tuple, build_train_data(config, tokenizer, seed=5).next_rows(per_round)["input_ids"].tolist())
    )
    # Stopped after an odd number of rows, gone on with by two ranks.
    before = again.next_rows(3)["input_ids"]
    halves = []
    for rank in range(2):
        resumed = build_train_data(config, tokenizer, seed=5)
        resumed.load_state_dict(again.state_dict())
        halves.append(resumed.next_rows(4, rank=rank, world_size=2)["input_ids"])
    assert torch.equal(torch.cat([before, *halves]), rows["input_ids"][:7])
    with pytest.raises(ConfigError, match="data.subset"):
        every.load_state_dict(data.state_dict())


def recipe(**data):
    model = {"config": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}}
    source = {"type": "hf", "path": "a.jsonl", **data.pop("source", {})}
    data = {"source": source, "sequence_length": 32, **data}
    batch = {"tokens_per_step": 64, "tokens_per_micro_batch": 32}
    return Recipe.model_validate({"model": model, "data": data, "batch": batch, "train": {"epochs": 5}})


def test_epochs_count_rounds_and_streams_are_refused():
    long = with_length_in_tokens(recipe(subset={"share": 0.2}), rows_per_epoch=7)
    assert long.train.total_tokens == 5 * 7 * 32
    with pytest.raises(ValueError, match="takes rows by their number"):
        recipe(subset={"share": 0.2}, source={"streaming": True})
