"""The teacher's confidence: measured once, over all labels, and remembered."""

import pytest
import torch

from leanmill.core.rules import StepContext
from leanmill.distill.logits.config import Distill
from leanmill.trainer.scoring import TokenLosses
from tests.core.tiny import context, tiny, tokens


def batch_of(seed, num_masked):
    ids = tokens(2, 9, seed=seed)
    labels = ids.roll(-1, 1).clone()
    labels[:, 9 - num_masked :] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(9).expand(2, -1).contiguous()}


def installed(teacher, **settings):
    found = Distill(teacher="t", divergence="cakld", **settings).install(None, context(teacher))
    return found.loss_terms[0], found.step_rules


def test_is_the_mean_probability_of_the_labels_and_is_measured_once():
    teacher = tiny(seed=9)
    term, (rule,) = installed(teacher)
    batches, asked = [batch_of(1, 1), batch_of(2, 5)], []

    def score(batch, model=None):
        asked.append(model)
        return TokenLosses(model)(batch)

    step = StepContext(step=0, num_steps=4, num_micro_batches=2)
    assert rule.change_batches(batches, step, score) is batches
    probabilities = [
        teacher(b["input_ids"]).logits.softmax(-1).gather(-1, b["labels"].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        for b in batches
    ]
    wanted = torch.cat([p[b["labels"] != -100] for p, b in zip(probabilities, batches, strict=True)]).mean()
    assert term.beta == pytest.approx(float(wanted), rel=1e-4)
    assert asked == [teacher, teacher]
    rule.change_batches([batch_of(3, 1)], step, score)
    assert len(asked) == 2
    assert rule.metrics() == {"confidence": term.beta}
    again, (resumed,) = installed(teacher)
    resumed.load_state_dict(rule.state_dict())
    assert again.beta == term.beta
    resumed.change_batches(batches, step, score)
    assert len(asked) == 2


def test_a_given_confidence_needs_no_rule():
    term, rules = installed(tiny(), confidence=0.3)
    assert term.beta == 0.3
    assert rules == ()
