"""Several teachers: the mean of their probabilities, by whatever path, and what is refused."""

import pytest
import torch
from pydantic import ValidationError

from leanmill.core.rules import StepContext
from leanmill.distill.logits.config import Distill
from leanmill.distill.logits.divergence import divergence
from leanmill.distill.logits.teachers import mean_logits
from leanmill.trainer.scoring import TokenLosses
from tests.core.tiny import VOCAB_SIZE, context, tiny, tokens


def two(**sizes):
    known = {"one": tiny(seed=9, hidden_size=24), "other": tiny(seed=8, vocab_size=VOCAB_SIZE + 2, **sizes)}
    known = {name: model.eval().requires_grad_(False) for name, model in known.items()}
    return known, context(load_frozen_model=known.__getitem__, other_tokens=lambda path: "")


def batch_of(ids):
    labels = ids.roll(-1, 1).clone()
    labels[:, -1], labels[0, :4] = -100, -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(ids.shape[1]).expand_as(ids).contiguous()}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logits_whose_softmax_is_the_mean_of_probabilities(temperature):
    logits, weights = [torch.randn(5, 11, dtype=torch.float64) * 4 for _ in range(3)], [0.5, 0.2, 0.3]
    got = (mean_logits(logits, weights, temperature) / temperature).softmax(-1)
    expected = sum(w * (z / temperature).softmax(-1) for w, z in zip(weights, logits, strict=True))
    torch.testing.assert_close(got, expected)
    assert mean_logits([torch.randn(2, 3).bfloat16()], [1.0], 1.0).dtype == torch.float32


@pytest.mark.parametrize("top_k", [None, 7])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "mse"])
def test_both_paths_compare_with_the_mean(kind, top_k):
    if kind == "mse" and top_k:
        return
    known, offered = two()
    config = Distill(teacher=["one", "other"], teacher_weights=[3, 1], divergence=kind, temperature=1.5, top_k=top_k)
    term = config.install(None, offered).loss_terms[0]
    batch = batch_of(tokens())
    extras = {name: value.flatten(0, 1) for name, value in term.prepare(batch).items()}
    labels, hidden = batch["labels"].flatten(), torch.randn(26, 16, requires_grad=True)
    weight = torch.randn(VOCAB_SIZE, 16, requires_grad=True)
    of_teachers = [model(batch["input_ids"]).logits[..., :VOCAB_SIZE].flatten(0, 1) for model in known.values()]
    if kind == "mse":
        mean = 0.75 * of_teachers[0] + 0.25 * of_teachers[1]
    else:
        mean = 1.5 * sum(w * (z / 1.5).softmax(-1) for w, z in zip((0.75, 0.25), of_teachers, strict=True)).log()
    per_token = divergence(hidden @ weight.T, mean, kind=kind, temperature=1.5, top_k=top_k)
    expected = torch.where(labels != -100, per_token, 0.0).sum()
    gradients = torch.autograd.grad(expected, (hidden, weight))
    torch.testing.assert_close(term(hidden @ weight.T, labels, extras), expected, rtol=1e-4, atol=1e-4)
    total, _, found = term.with_cross_entropy(
        (hidden, weight, None), labels, extras, cross_entropy_weight=0.0, chunk_tokens=8
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for got, wanted in zip(torch.autograd.grad(total, (hidden, weight)), gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_a_cache_of_several_is_of_their_mean_and_says_so(tmp_path):
    known, offered = two()
    fingerprints = {"one": "1a", "other": "2b"}
    offered = context(
        load_frozen_model=known.__getitem__,
        other_tokens=lambda path: "",
        fingerprint_of_model=fingerprints.__getitem__,
        data_fingerprint="d",
        tokenizer_fingerprint="t",
    )
    config = Distill(teacher=["one", "other"], top_k=3, cache_dir=str(tmp_path))
    installed = config.install(None, offered)
    batch = batch_of(tokens()) | {"row_ids": torch.arange(2)}
    step = StepContext(step=0, num_steps=1, num_micro_batches=1)
    installed.step_rules[0].change_batches([batch], step, None)
    extras = installed.loss_terms[0].prepare(batch)
    mean = sum(model(batch["input_ids"]).logits[..., :VOCAB_SIZE].softmax(-1) for model in known.values()) / 2
    torch.testing.assert_close(extras["teacher_log_probs"].exp(), mean.topk(3).values, rtol=1e-2, atol=1e-4)
    manifest = (tmp_path / "manifest.json").read_text()
    assert '"0.5 x one + 0.5 x other"' in manifest
    assert '"0.5 x 1a + 0.5 x 2b"' in manifest


def test_confidence_is_of_the_mean():
    known, offered = two()
    config = Distill(teacher=["one", "other"], teacher_weights=[1, 3], divergence="cakld")
    installed = config.install(None, offered)
    batch, step = batch_of(tokens()), StepContext(step=0, num_steps=1, num_micro_batches=1)
    installed.step_rules[0].change_batches([batch], step, lambda b, model: TokenLosses(model)(b))
    each = [model(batch["input_ids"]).logits.softmax(-1) for model in known.values()]
    mean = (each[0][..., :VOCAB_SIZE] + 3 * each[1][..., :VOCAB_SIZE]) / 4
    of_labels = mean.gather(-1, batch["labels"].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    assert installed.loss_terms[0].beta == pytest.approx(float(of_labels[batch["labels"] != -100].mean()), rel=1e-4)


def test_what_makes_no_mean_is_refused():
    with pytest.raises(ValidationError, match="weighs several teachers"):
        Distill(teacher="one", teacher_weights=[1.0])
    with pytest.raises(ValidationError, match="has 1 numbers and distill.teacher 2"):
        Distill(teacher=["one", "other"], teacher_weights=[1.0])
    with pytest.raises(ValidationError, match="'one' twice"):
        Distill(teacher=["one", "one"])
    assert Distill(teacher=["a", "b"]).frozen_models() == {"teacher.0": "a", "teacher.1": "b"}
