"""Held-out pairs: rank correlation and retrieval against scipy and a loop over pairs."""

import math

import pytest
import torch
from scipy.stats import spearmanr

from leanmill.trainer.sentence_evaluation import TEMPERATURE, measures, spearman


def test_vectors_that_are_no_numbers_correlate_with_nothing():
    one, other = torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([1.0, 2.0, 3.0])
    assert math.isnan(spearman(one, other))
    assert math.isnan(spearman(other, one))


def test_spearman_is_scipys_with_ties():
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(0, 5, (40,), generator=generator).float()
    other = one + torch.randint(0, 7, (40,), generator=generator)
    assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic, abs=1e-9)
    assert spearman(one, torch.ones(40)) == 0.0


def rows(count=9, num_texts=3, length=4):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (count, num_texts, length), generator=generator)
    lengths = torch.randint(2, length + 1, (count, num_texts), generator=generator)
    lengths[::2, 2] = 0
    ids[4, 1], lengths[4, 1] = ids[0, 1], lengths[0, 1]
    scores = torch.full((count, 1), torch.nan)
    scores[5:8, 0] = torch.tensor([0.1, 0.7, 0.4])
    vectors = torch.randn(count, num_texts, 6, generator=generator)
    vectors[4, 1] = vectors[0, 1]
    vectors[:, 1] += vectors[:, 0]
    return vectors, {"input_ids": ids.flatten(1), "text_lengths": lengths, "scores": scores}


def test_each_first_text_looks_for_its_second_among_all():
    vectors, given = rows()
    found = measures(vectors, given)
    unit, lengths = torch.nn.functional.normalize(vectors, dim=-1), given["text_lengths"]
    ids = given["input_ids"].view(9, 3, 4)
    plain = [i for i in range(9) if given["scores"][i, 0].isnan()]
    text = {(i, t): tuple(ids[i, t, : lengths[i, t]].tolist()) for i in plain for t in (1, 2) if lengths[i, t] > 0}
    losses, places = [], []
    for i in plain:
        others = torch.stack([unit[i, 0] @ unit[key] for key in text if text[key] != text[i, 1]])
        own = unit[i, 0] @ unit[i, 1]
        losses.append(torch.logsumexp(torch.cat([own[None], others]) / TEMPERATURE, 0) - own / TEMPERATURE)
        places.append(1 + int((others > own).sum()))
    assert found["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert found["retrieval_accuracy"] == pytest.approx(sum(p == 1 for p in places) / len(places))
    assert found["mean_reciprocal_rank"] == pytest.approx(sum(1 / p for p in places) / len(places))
    assert 0 < found["retrieval_accuracy"] < 1
    cosines = [float(unit[i, 0] @ unit[i, 1]) for i in (5, 6, 7)]
    assert found["spearman"] == pytest.approx(spearmanr(cosines, [0.1, 0.7, 0.4]).statistic)


def test_where_all_pairs_have_scores_the_loss_is_what_lacks_to_their_order():
    vectors, given = rows()
    given["scores"] = torch.linspace(0, 1, 9)[:, None]
    found = measures(vectors, given)
    assert found.keys() == {"spearman", "loss"}
    assert found["loss"] == pytest.approx(1 - found["spearman"])


@pytest.mark.parametrize("value", [0.5, 0.0, torch.nan])
def test_vectors_that_are_all_alike_find_nothing(value):
    vectors, given = rows()
    found = measures(torch.full_like(vectors, value), given)
    assert found["retrieval_accuracy"] == 0
    assert found["mean_reciprocal_rank"] < 0.2
