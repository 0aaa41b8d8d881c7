"""NEFTune against the paper's formula, document by document, and what must not notice it."""

import pytest
import torch

from leanmill.architecture.neftune.around import NoisyEmbeddings, document_lengths
from leanmill.core.around import arounds
from leanmill.core.errors import RunError
from leanmill.core.ledger import Ledger
from leanmill.core.registry import parse_technique
from leanmill.core.rules import StepContext
from leanmill.trainer.prepare import install_techniques
from tests.core.tiny import context, install, tiny


LENGTHS = [[5, 3, 3], [11], [1, 10]]
"""Of the documents of each row."""


def batch(row_ids=(4, 9, 2)):
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    ids = torch.arange(33).view(3, 11)
    return {"input_ids": ids, "labels": ids, "position_ids": positions, "row_ids": torch.tensor(row_ids)}


def noisy(alpha=7.0, **given):
    """A tiny model with NEFTune, told of a micro-batch, and its rules."""
    model, ledger = tiny(), Ledger()
    offered = context(seed=3, ledger=ledger)
    found = install_techniques([parse_technique({"type": "neftune", "alpha": alpha})], model, offered)
    step(found, 0)
    ledger.begin_forward(batch(**given))
    return model.train(), found, ledger


def step(found, number):
    for rule in found.step_rules:
        rule.begin_step(StepContext(step=number, num_steps=4, num_micro_batches=1))


def drawn(model, of):
    table = model.get_input_embeddings()
    return table(of["input_ids"]) - type(table).forward(table, of["input_ids"])


def test_noise_fills_the_range_that_a_documents_length_gives():
    model, _, _ = noisy()
    size = model.config.hidden_size
    noise = drawn(model, batch()).detach()
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part, edge = noise[row, start : start + length], 7.0 / (length * size) ** 0.5
            assert part.abs().max() <= edge
            assert part.abs().max() > 0.8 * edge
            assert abs(part.mean()) < 4 * edge / (3 * part.numel()) ** 0.5  # of a uniform mean 0
            assert part.square().mean() == pytest.approx(edge**2 / 3, rel=0.35)
            start += length


def test_lengths_of_documents_also_where_a_row_begins_inside_of_one():
    positions = torch.tensor([[3, 4, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    assert document_lengths(positions).tolist() == [[2, 2, 1, 3, 3, 3], [6] * 6]


def test_noise_follows_step_and_row_and_nothing_else():
    model, found, ledger = noisy()
    first = drawn(model, batch())
    assert torch.equal(drawn(model, batch()), first)  # as recomputation sees it
    step(found, 1)
    assert not torch.equal(drawn(model, batch()), first)
    step(found, 0)
    ledger.begin_forward({name: value[1:] for name, value in batch().items()})  # as another rank has them
    assert torch.equal(drawn(model, {name: value[1:] for name, value in batch().items()}), first[1:])
    ledger.begin_forward(batch(row_ids=(5, 9, 2)))
    other = drawn(model, batch())
    assert not torch.equal(other[0], first[0])
    assert torch.equal(other[1:], first[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_at_the_noisy_embeddings(dtype):
    model, _, _ = noisy()
    model.to(dtype)
    of, inputs = batch(), {"position_ids": batch()["position_ids"], "labels": batch()["labels"]}
    model(input_ids=of["input_ids"], **inputs).loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    table = model.get_input_embeddings()
    plain = type(table).forward(table, of["input_ids"])
    embeddings = plain + drawn(model, of).detach()
    model(inputs_embeds=embeddings, **inputs).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


def test_evaluation_sees_none_and_a_staged_table_keeps_it():
    model, _, _ = noisy()
    of = batch()
    assert torch.equal(model.eval()(input_ids=of["input_ids"]).logits, tiny().eval()(input_ids=of["input_ids"]).logits)
    staged = {"type": "ternary", "targets": ["embed_tokens"]}
    install(model, staged)
    table = model.get_input_embeddings()
    assert table.is_staged
    assert [type(one) for one in arounds(table)] == [NoisyEmbeddings]
    assert next(arounds(table)).module is table
    assert drawn(model.train(), of).abs().max() > 0


def test_a_batch_of_unknown_rows_is_refused():
    model, _, ledger = noisy()
    ledger.begin_forward({name: value for name, value in batch().items() if name != "row_ids"})
    with pytest.raises(RunError, match="which rows a batch has"):
        model(input_ids=batch()["input_ids"])
