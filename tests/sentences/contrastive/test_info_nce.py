"""The contrastive loss against its equation over all rows at once: values, and gradients that parts add up to."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from leanmill.core.ledger import Ledger
from leanmill.sentences.contrastive.loss import ContrastiveLoss


def rows(count, num_texts, width, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, num_texts, width, generator=generator).to(dtype)
    lengths = torch.randint(1, 5, (count, num_texts), generator=generator)
    lengths[1::2, 2:] = 0
    ids = torch.randint(1, 9, (count, num_texts, 4), generator=generator)
    ids[-1, 1], lengths[-1, 1] = ids[0, 1], lengths[0, 1]  # the same second text twice
    scores = torch.full((count, 1), torch.nan)
    scores[2], scores[3] = 0.2, 0.9
    labels = torch.full((count, num_texts * 4), -100)
    labels[:, 0] = 1
    return vectors, {"text_lengths": lengths, "input_ids": ids.flatten(1), "scores": scores, "labels": labels}


def expected(vectors, batch, temperature, symmetric, positive_score):
    """-log softmax of each query's own key, written out pair by pair."""
    unit = F.normalize(vectors.float(), dim=-1)
    count, num_texts, _ = unit.shape
    lengths, score = batch["text_lengths"], batch["scores"][:, 0]
    ids = batch["input_ids"].view(count, num_texts, -1)
    text = {(i, j): tuple(ids[i, j, : lengths[i, j]].tolist()) for i in range(count) for j in range(num_texts)}
    used = [i for i in range(count) if score[i].isnan() or (positive_score is not None and score[i] >= positive_score)]

    def mean(query, own, keys):
        losses = []
        for i in used:
            others = [(a, b) for a in used for b in keys if lengths[a, b] > 0 and (a, b) != (i, own)]
            others = [key for key in others if text[key] != text[i, own]]
            cosines = torch.stack([unit[i, query] @ unit[a, b] for a, b in [(i, own), *others]])
            losses.append(-torch.log_softmax(cosines / temperature, 0)[0])
        return torch.stack(losses).mean()

    first = mean(0, 1, range(1, num_texts))
    return (first + mean(1, 0, [0])) / 2 if symmetric else first


@pytest.mark.parametrize(("count", "num_texts", "width"), [(7, 2, 5), (6, 4, 3)])
@pytest.mark.parametrize(("symmetric", "positive_score"), [(False, None), (True, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_add_up_to_the_equation(count, num_texts, width, symmetric, positive_score, dtype):
    vectors, batch = rows(count, num_texts, width, dtype=dtype)
    whole = vectors.clone().requires_grad_()
    want = expected(whole, batch, 0.1, symmetric, positive_score)
    want.backward()
    ledger = Ledger()
    loss = ContrastiveLoss(
        ledger, temperature=0.1, whole_step=True, symmetric=symmetric, positive_score=positive_score, weight=1.0
    )
    # Micro-batches of unequal sizes: nothing in the mathematics wants them equal.
    cuts = [slice(0, 1), slice(1, 4), slice(4, count)]
    parts = [{name: value[cut] for name, value in batch.items()} for cut in cuts]
    leaves = [vectors[cut].clone().requires_grad_() for cut in cuts]

    number = {id(part): index for index, part in enumerate(parts)}
    ledger.see_step(parts, lambda part: loss.of_embeddings(leaves[number[id(part)]].detach().float(), part))
    total = sum(loss.of_embeddings(leaf.float(), part) for leaf, part in zip(leaves, parts, strict=True)) / count
    total.backward()
    torch.testing.assert_close(total, want, rtol=1e-4, atol=1e-5)
    got = torch.cat([leaf.grad for leaf in leaves])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(got, whole.grad, **tolerance)


def test_negatives_of_a_micro_batch_are_its_own():
    vectors, batch = rows(6, 3, 4)
    ledger = Ledger()
    loss = ContrastiveLoss(ledger, temperature=0.1, whole_step=False, symmetric=False, positive_score=None, weight=1.0)
    parts = [{name: value[cut] for name, value in batch.items()} for cut in (slice(0, 3), slice(3, 6))]
    ledger.see_step(parts, lambda part: pytest.fail("nothing is to be looked at"))
    for cut, part in zip((slice(0, 3), slice(3, 6)), parts, strict=True):
        got = loss.of_embeddings(vectors[cut], part) / 3
        torch.testing.assert_close(got, expected(vectors[cut], part, 0.1, False, None), rtol=1e-4, atol=1e-5)


def test_texts_are_told_apart_by_their_tokens_alone():
    vectors, batch = rows(4, 2, 4)
    vectors, batch = vectors[:2], {name: value[:2] for name, value in batch.items()}
    batch["text_lengths"][:] = 2
    batch["input_ids"] = torch.tensor([[1, 2, 0, 0, 3, 4, 0, 0], [5, 6, 0, 0, 3, 4, 9, 9]])
    batch["scores"][:] = torch.nan
    loss = ContrastiveLoss(Ledger(), temperature=0.1, whole_step=True, symmetric=False, positive_score=None, weight=1.0)
    assert float(loss.of_embeddings(vectors, batch)) == pytest.approx(0.0, abs=1e-6)  # no key is left to tell from
