"""What the student writes: draws, places, labels and ends, whatever the micro-batches; and what is refused."""

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.core.noise import derive_seed, gumbel, uniform
from leanmill.core.rules import StepContext
from leanmill.distill.on_policy import rule as module
from leanmill.distill.on_policy.config import OnPolicy
from leanmill.recipe.io import validate_recipe
from leanmill.trainer.scoring import next_logits
from tests.core.tiny import VOCAB_SIZE, context, tiny, tokens


STEP = StepContext(step=0, num_steps=4, num_micro_batches=1)


class Asked:
    """What a rule is offered, with a record of the shapes it was asked for."""

    def __init__(self, model):
        self.model, self.shapes = model.eval(), []

    @torch.no_grad()
    def next_logits(self, batch):
        self.shapes.append(tuple(batch["input_ids"].shape))
        return next_logits(self.model, batch)


def batch_of(num_rows=6, length=10, first=0):
    ids = tokens(num_rows, length, seed=5)
    labels = ids.roll(-1, 1).clone()
    labels[:, -1] = -100
    positions = torch.arange(length).expand_as(ids).clone()
    positions[0, 2:] -= 2  # a document ends inside the prompt
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "row_ids": torch.arange(num_rows) + first}


def rule_of(seed=0, end_of_text=None, num_tokens=VOCAB_SIZE, **settings):
    config = OnPolicy(**{"prompt_tokens": 4, **settings})
    offered = context(seed=seed, end_of_text=end_of_text, num_tokens=num_tokens)
    return config.install(None, offered).step_rules[0]


def by_hand(model, batch, row, prompt, *, temperature, seed=0, num_tokens=VOCAB_SIZE):
    """Draw one token after another from softmax(z / T), one row alone and not padded."""
    ids, positions = batch["input_ids"][row, :prompt].tolist(), batch["position_ids"][row, :prompt].tolist()
    length, key = batch["input_ids"].shape[1], torch.tensor([derive_seed(seed, "on_policy", "tokens")])
    while len(ids) < length:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions])).logits[0, -1]
        number = int(batch["row_ids"][row]) * length + len(ids)
        noise = gumbel(key, number * num_tokens + torch.arange(num_tokens))
        ids.append(int((logits[:num_tokens] / temperature + noise).argmax()))
        positions.append(positions[-1] + 1)
    return torch.tensor(ids), torch.tensor(positions)


def test_chosen_rows_are_drawn_token_by_token_and_the_others_stay():
    model, batch = tiny(), batch_of()
    rule = rule_of(share=0.6, temperature=0.5)
    (got,) = rule.change_batches([batch], STEP, Asked(model))
    chosen = uniform(torch.tensor([derive_seed(0, "on_policy", "rows")]), batch["row_ids"]) < 0.6
    assert 0 < chosen.sum() < 6
    for row in range(6):
        if not chosen[row]:
            assert all(torch.equal(got[name][row], value[row]) for name, value in batch.items())
            continue
        ids, positions = by_hand(model, batch, row, 4, temperature=0.5)
        assert torch.equal(got["input_ids"][row], ids)
        assert torch.equal(got["position_ids"][row], positions)
        assert torch.equal(got["labels"][row], torch.cat([torch.full((3,), -100), ids[4:], torch.tensor([-100])]))
    assert got["token_mask"].all()
    assert rule.metrics() == {"share": pytest.approx(int(chosen.sum()) / 6), "tokens_a_row": 6}
    assert torch.equal(batch["input_ids"], batch_of()["input_ids"])


def test_nothing_depends_on_micro_batches_and_forwards_are_few_and_of_one_shape():
    model, batch = tiny(), batch_of(8)
    asked = Asked(model)
    (whole,) = rule_of(share=0.5).change_batches([batch], STEP, Asked(model))
    parts = [{name: value[start : start + 2] for name, value in batch.items()} for start in range(0, 8, 2)]
    found = rule_of(share=0.5).change_batches(parts, STEP, asked)
    for name in whole:
        assert torch.equal(torch.cat([part[name] for part in found]), whole[name])
    num_written = int((whole["labels"][:, 0] == -100).sum())
    assert asked.shapes == [(2, 10)] * (6 * -(-num_written // 2))


def test_fewer_tokens_than_a_row_and_an_end_of_text_leave_padding_without_labels():
    model, batch = tiny(), batch_of(4)
    asked = Asked(model)
    (cut,) = rule_of(share=1.0, new_tokens=3).change_batches([batch], STEP, asked)
    assert asked.shapes == [(4, 7)] * 3
    assert torch.equal(cut["token_mask"], torch.arange(10).expand(4, -1) < 7)
    assert torch.equal(cut["labels"] != -100, (torch.arange(10) >= 3).expand(4, -1) & (torch.arange(10) < 6))
    end = int(cut["input_ids"][2, 5])
    (ended,) = rule_of(share=1.0, end_of_text=end).change_batches([batch], STEP, asked)
    assert ended["input_ids"][2, 5] == end
    assert (ended["labels"][2] != -100).nonzero().flatten().tolist() == [3, 4]
    assert ended["token_mask"][2].tolist() == [True] * 6 + [False] * 4


def test_a_question_is_what_comes_before_the_first_label():
    model, batch = tiny(), batch_of(3)
    batch["labels"][0, :6], batch["labels"][1], batch["labels"][2, :2] = -100, -100, -100
    (got,) = rule_of(share=1.0, prompt_tokens="until_label").change_batches([batch], STEP, Asked(model))
    assert torch.equal(got["input_ids"][1], batch["input_ids"][1])
    for row, prompt in ((0, 7), (2, 3)):
        assert torch.equal(got["input_ids"][row], by_hand(model, batch, row, prompt, temperature=1.0)[0])
        assert (got["labels"][row] != -100).nonzero()[0] == prompt - 1


def test_tokens_are_drawn_as_often_as_they_are_likely_and_never_beyond_the_tokenizer():
    model = tiny(vocab_size=12, num_hidden_layers=1)
    ids = torch.full((3000, 5), 3)
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(5).expand_as(ids)}
    batch["row_ids"] = torch.arange(3000)
    rule = rule_of(share=1.0, new_tokens=1, num_tokens=10)
    (got,) = rule.change_batches([batch], STEP, Asked(model))
    with torch.no_grad():
        expected = model(input_ids=torch.full((1, 4), 3)).logits[0, -1, :10].softmax(-1)
    share = torch.bincount(got["input_ids"][:, 4], minlength=10)[:10] / 3000
    assert got["input_ids"].max() < 10
    assert (share - expected).abs().max() < 4 * (expected / 3000).sqrt().max()


def recipe(*techniques, weight=0.0, task="pretrain"):
    return {
        "model": {"config": {"model_type": "llama"}},
        "data": {"sequence_length": 64, "task": task},
        "batch": {"tokens_per_step": 256, "tokens_per_micro_batch": 128},
        "train": {"steps": 1, "cross_entropy_weight": weight},
        "techniques": list(techniques),
    }


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (recipe({"type": "on_policy"}, {"type": "distill", "teacher": "t"}, weight=0.5), "cross_entropy_weight=0"),
        (recipe({"type": "on_policy"}, {"type": "ternary"}), "no teacher looks at it"),
        (
            recipe({"type": "on_policy"}, {"type": "distill", "teacher": "t", "top_k": 4, "cache_dir": "c"}),
            "remove cache_dir",
        ),
        (recipe({"type": "on_policy"}, {"type": "on_policy"}, {"type": "distill", "teacher": "t"}), "is there 2 times"),
        (recipe({"type": "on_policy", "prompt_tokens": 64}, {"type": "distill", "teacher": "t"}), "between 1 and"),
        (
            recipe({"type": "on_policy", "new_tokens": 40}, {"type": "distill", "teacher": "t"}),
            r"on_policy\.new_tokens=32",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_to_type(raw, said):
    with pytest.raises(ConfigError, match=said):
        validate_recipe(raw)


def test_early_exits_that_would_count_nothing_are_refused():
    exits = {"type": "stochastic_depth", "early_exit": {}}
    with pytest.raises(ConfigError, match=r"remove stochastic_depth\.early_exit"):
        validate_recipe(recipe({"type": "on_policy"}, {"type": "distill", "teacher": "t"}, exits))
    with pytest.raises(ConfigError, match=r"remove stochastic_depth\.early_exit"):
        validate_recipe(recipe({"type": "distill", "teacher": "t"}, exits))
    validate_recipe(recipe({"type": "distill", "teacher": "t"}, exits, weight=0.5))


def test_a_rank_without_rows_of_its_own_runs_the_same_shape(monkeypatch):
    model, batch = tiny(), batch_of(4)
    rule, asked = rule_of(share=1e-9, new_tokens=3), Asked(model)
    # Another rank has two rows to write, of three tokens.
    told = iter([2, 3])
    monkeypatch.setattr(module, "max_over_ranks", lambda own: torch.tensor(next(told)))
    monkeypatch.setattr(module, "sum_over_ranks", lambda own: own + 1)
    (got,) = rule.change_batches([batch], STEP, asked)
    assert asked.shapes == [(4, 7)] * 3
    assert torch.equal(got["input_ids"], batch["input_ids"])


def test_no_seed_is_refused():
    with pytest.raises(ConfigError, match="seed: 0"):
        OnPolicy().install(None, context(seed=None))
