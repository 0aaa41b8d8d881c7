"""Selective language modelling against the equations of its paper, and what it refuses.

Lin et al. 2024 (arXiv:2404.07965), section 2.2: with the excess loss L_d(x) = L_theta(x) - L_ref(x),
L_SLM = -1 / (N k%) sum_i I_k%(x_i) log P(x_i | x_<i; theta), where I_k% is 1 for the tokens whose
excess loss ranks in the top k% and 0 elsewhere.
"""

import math

import pytest
import torch
import torch.distributed as dist

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.rules import StepContext
from leanmill.distill.rho1.config import Rho1
from leanmill.distill.rho1.rule import choose
from leanmill.parallel.collectives import sum_over_ranks
from leanmill.trainer.scoring import TokenLosses
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import VOCAB_SIZE, context, tiny, tokens
from tests.distributed import run_ranks


def batch_of(num_rows, length, *, first_row=0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(VOCAB_SIZE, (num_rows, length), generator=generator)
    for row in range(num_rows):
        labels[row, : (5 * row) % length] = -100
    return {
        "input_ids": tokens(num_rows, length, seed=seed),
        "labels": labels,
        "position_ids": torch.arange(length).expand(num_rows, -1).contiguous(),
        "row_ids": torch.arange(first_row, first_row + num_rows),
    }


def rule_of(reference, **settings):
    return Rho1(reference="r", **settings).install(None, context(reference)).step_rules[0]


def changed(rule, batches, student, step=0):
    """What the rule makes of the batches in one of ten steps."""
    of_student = TokenLosses(student)

    def score(batch, model=None):
        return of_student(batch) if model is None else TokenLosses(model)(batch)

    context = StepContext(step=step, num_steps=10, num_micro_batches=len(batches))
    return rule.change_batches(batches, context, score)


def log_probabilities(model, batch):
    """log P(x_i | x_<i) of every target [B, S], fp64; those without one are wrong."""
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    return logits.double().log_softmax(-1).gather(-1, batch["labels"].clamp(min=0).unsqueeze(-1)).squeeze(-1)


def slm(student, reference, batches, share):
    """The paper's loss over all tokens of `batches`, ranked together."""
    of_student = torch.cat([log_probabilities(student, b)[b["labels"] != -100] for b in batches])
    with torch.no_grad():
        of_reference = torch.cat([log_probabilities(reference, b)[b["labels"] != -100] for b in batches])
        excess = of_reference - of_student.detach()
        num_kept = round(share * len(excess))
        indicator = torch.zeros_like(excess)
        indicator[excess.topk(num_kept).indices] = 1
    return -(indicator * of_student).sum() / num_kept


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
@pytest.mark.parametrize("shapes", [[(3, 7)], [(2, 13), (3, 13)]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_the_papers(dtype, shapes, share):
    student, reference = tiny().to(dtype), tiny(seed=9, hidden_size=24).to(dtype)
    batches = [batch_of(*shape, first_row=10 * i, seed=i) for i, shape in enumerate(shapes)]
    expected = slm(student, reference, batches, share)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    chosen = changed(rule_of(reference, kept_share=share), batches, student)
    num_kept = sum((batch["labels"] != -100).sum() for batch in chosen)
    module = TrainModule(student)
    got = sum(module(batch)["total"] for batch in chosen) / num_kept
    got.backward()
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 2e-3}
    torch.testing.assert_close(got.double(), expected, **tolerance)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_each_micro_batch_may_rank_its_own_tokens():
    student, reference = tiny(), tiny(seed=9)
    batches = [batch_of(2, 13, seed=1), batch_of(3, 13, seed=2)]
    rule = rule_of(reference, kept_share=0.3, scope="micro_batch")
    for batch, chosen in zip(batches, changed(rule, batches, student), strict=True):
        got = TrainModule(student)(chosen)["total"] / (chosen["labels"] != -100).sum()
        torch.testing.assert_close(got.double(), slm(student, reference, [batch], 0.3), rtol=1e-4, atol=1e-6)


def test_only_labels_change_and_the_batches_given_stay():
    batches = [batch_of(2, 13)]
    before = {name: value.clone() for name, value in batches[0].items()}
    (chosen,) = changed(rule_of(tiny(seed=9)), batches, tiny())
    for name, value in before.items():
        assert torch.equal(batches[0][name], value), name
        assert name == "labels" or torch.equal(chosen[name], value), name
    kept = chosen["labels"] != -100
    assert torch.equal(chosen["labels"][kept], before["labels"][kept])
    assert kept.sum() == round(0.6 * (before["labels"] != -100).sum().item())


def by_hand(excess, labels, share):
    """Tokens kept of one list in the order of the data: largest first, of equal ones the first."""
    candidates = [i for i in range(len(labels)) if labels[i] != -100]
    ranked = sorted(candidates, key=lambda i: (-excess[i], i))
    kept = set(ranked[: max(1, round(share * len(ranked)))] if ranked else [])
    return [i in kept for i in range(len(labels))]


def tied(seed=3):
    """Four micro-batches with few different losses."""
    batches = [batch_of(2, 9, first_row=1000 + 2 * i, seed=i) for i in range(4)]
    generator = torch.Generator().manual_seed(seed)
    return batches, [torch.randint(-2, 2, (2, 9), generator=generator) / 2 for _ in batches]


@pytest.mark.parametrize("share", [0.02, 0.37, 0.5, 0.99])
def test_of_equal_losses_the_first_tokens_are_kept(share):
    batches, excess = tied()
    got = choose(excess, batches, share, "step", lambda counts: counts)
    labels = torch.cat([b["labels"].flatten() for b in batches]).tolist()
    expected = by_hand(torch.cat(excess).flatten().tolist(), labels, share)
    assert torch.cat(got).flatten().tolist() == expected


def test_two_ranks_keep_the_tokens_that_one_process_keeps():
    batches, excess = tied()

    def body():
        part = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        return torch.cat(choose(excess[part], batches[part], 0.37, "step", sum_over_ranks))

    expected = torch.cat(choose(excess, batches, 0.37, "step", lambda counts: counts))
    assert torch.equal(torch.cat(run_ranks(body, 2)), expected)


@pytest.mark.parametrize("scope", ["step", "micro_batch"])
def test_a_micro_batch_without_labels_keeps_none(scope):
    batches = [batch_of(2, 9), batch_of(2, 9)]
    batches[0]["labels"].fill_(-100)
    chosen = changed(rule_of(tiny(seed=9), scope=scope), batches, tiny())
    assert (chosen[0]["labels"] == -100).all()
    assert (chosen[1]["labels"] != -100).any()


def test_a_loss_that_is_no_number_is_trained_on_so_that_the_step_is_noticed():
    batch = batch_of(1, 9)
    excess = torch.zeros(1, 9)
    excess[0, 4] = math.nan
    (kept,) = choose([excess], [batch], 0.01, "step", lambda counts: counts)
    assert kept.nonzero().tolist() == [[0, 4]]


def test_during_warm_up_every_token_trains_and_nothing_is_loaded():
    batches = [batch_of(2, 9)]
    rule = rule_of(None, warmup_share=0.5)
    assert changed(rule, batches, tiny(), step=4) is batches
    with pytest.raises(AssertionError, match="nobody should load r"):
        changed(rule, batches, tiny(), step=5)


def test_a_reference_with_another_vocabulary_is_refused():
    with pytest.raises(ConfigError, match=r"reference r has a vocabulary of 50 .* set data.tokenizer.path: r"):
        changed(rule_of(tiny(seed=9, vocab_size=50)), [batch_of(2, 9)], tiny())


def test_a_reference_without_numbers_is_refused():
    reference = tiny(seed=9)
    reference.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(RunError, match="reference r has no finite loss"):
        changed(rule_of(reference), [batch_of(2, 9)], tiny())
