from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.core.errors import ConfigError
from leanmill.trainer.loss_paths import FromLogits
from leanmill.trainer.train_module import TrainModule


class SquaredLogits:
    """A term whose value depends on logits, labels and its own extras."""

    name, weight = "squared", 0.25

    def prepare(self, batch):
        return {"scale": batch["input_ids"].float().unsqueeze(-1)}

    def __call__(self, logits, labels, extras):
        kept = labels != -100
        return (logits.float()[kept].square() * extras["scale"][kept]).sum()


def _model(**changes):
    config = AutoConfig.for_model(
        "llama",
        vocab_size=37,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        **changes,
    )
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config)


def _batch(rows=3, length=7):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(37, (rows, length), generator=generator)
    labels = torch.randint(37, (rows, length), generator=generator)
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(length).expand(rows, -1).contiguous()}


def _gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 20])
def test_chunked_losses_and_gradients_equal_whole_ones(chunk, tied):
    batch = _batch()
    whole = TrainModule(_model(tie_word_embeddings=tied).double(), [SquaredLogits()], 0.7, 21)
    cut = TrainModule(_model(tie_word_embeddings=tied).double(), [SquaredLogits()], 0.7, chunk)
    expected, got = whole(batch), cut(batch)
    assert expected.keys() == got.keys() == {"cross_entropy", "squared", "total"}
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])
    expected["total"].backward()
    got["total"].backward()
    for name, value in _gradients(whole).items():
        torch.testing.assert_close(cut.get_parameter(name).grad, value, rtol=1e-4, atol=1e-5)


def test_total_is_the_weighted_sum_and_cross_entropy_counts_labels_only():
    module, batch = TrainModule(_model(), [SquaredLogits()], 0.5), _batch()
    losses = module(batch)
    logits = module.model(batch["input_ids"]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(losses["cross_entropy"], expected)
    torch.testing.assert_close(losses["total"], 0.5 * losses["cross_entropy"] + 0.25 * losses["squared"])


class Named(SquaredLogits):
    def __init__(self, name, weight):
        self.name, self.weight = name, weight


def test_terms_of_one_name_all_count_under_names_of_their_own():
    terms = [Named(name, weight) for name, weight in (("a", 1.0), ("a", 2.0), ("a_2", 3.0), ("total", 4.0))]
    losses = TrainModule(_model(), terms, 0.0)(_batch())
    names = ["a", "a_2", "a_2_2", "total_2"]
    assert list(losses) == ["cross_entropy", *names, "total"]
    weighted = sum(term.weight * losses[name] for term, name in zip(terms, names, strict=True))
    torch.testing.assert_close(losses["total"], weighted)


def test_terms_are_for_training_only():
    losses = TrainModule(_model(), [SquaredLogits()]).eval()(_batch())
    assert losses.keys() == {"cross_entropy", "total"}


def test_a_row_without_labels_costs_nothing_but_stays_finite():
    batch = _batch()
    batch["labels"].fill_(-100)
    losses = TrainModule(_model(), chunk_tokens=4)(batch)
    assert losses["total"].item() == 0
    losses["total"].backward()


def test_chunking_a_head_that_scales_its_logits_is_refused():
    module = TrainModule(_model(), chunk_tokens=4)
    module.model.config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match="logits_chunk_tokens"):
        module(_batch())


def test_auto_keeps_small_logits_whole_and_cuts_large_ones():
    model = _model()
    path = FromLogits(model, "auto")
    assert path.chunk_size(1000) == 1000
    model.config.vocab_size = 2**18
    assert path.chunk_size(4096) == 256
