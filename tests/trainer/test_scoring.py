"""Losses of single tokens against those of logits, for every way in which a family makes its logits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from leanmill.parallel.config import SingleEngine as SingleConfig
from leanmill.parallel.engine import Preparation
from leanmill.parallel.launch import Ranks
from leanmill.parallel.single import SingleEngine
from leanmill.trainer.scoring import Scores, TokenLosses
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import FAMILIES, install, tiny
from tests.trainer.test_losses import _SPECIAL, batch_of, model_of


def from_logits(model, batch):
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="none"
    )
    return losses.view_as(batch["labels"]).detach()


@pytest.mark.parametrize("family", [*FAMILIES, *_SPECIAL])
def test_losses_of_tokens_are_those_of_logits(family):
    model, batch = model_of(family, **_SPECIAL.get(family, {})).eval(), batch_of()
    score = TokenLosses(model, chunk_tokens=8)
    got = score(batch)
    assert (got.shape, got.dtype, got.requires_grad) == (batch["labels"].shape, torch.float32, False)
    assert (got[batch["labels"] == -100] == 0).all()
    torch.testing.assert_close(got, from_logits(model, batch), rtol=1e-4, atol=1e-5)
    assert torch.equal(score(batch), got)


def test_a_head_of_its_own_and_a_family_that_does_more_get_logits():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, batch = tiny(), batch_of()
    model.lm_head.__class__ = Doubled
    torch.testing.assert_close(TokenLosses(model)(batch), from_logits(model, batch), rtol=1e-4, atol=1e-5)
    other = tiny()
    plain = type(other).forward

    def capped(*args, **kwargs):
        found = plain(other, *args, **kwargs)
        found.logits = found.logits.tanh()
        return found

    other.forward = capped
    torch.testing.assert_close(TokenLosses(other)(batch), from_logits(other, batch), rtol=1e-4, atol=1e-5)


def test_the_student_is_scored_as_it_trains_and_a_frozen_model_as_it_is():
    """With techniques, in eval mode, leaving no gradient and the training mode as it was."""
    model, batch = tiny(), batch_of()
    install(model, {"type": "ternary"})
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    engine = SingleEngine(SingleConfig(), ranks=ranks, precision="fp32")
    engine.prepare(
        TrainModule(model),
        Preparation(
            materialise=lambda module: None,
            make_optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
            num_micro_batches=1,
            max_grad_norm=None,
        ),
    )
    engine.module.train()
    frozen = tiny(seed=9).eval()
    score = Scores(engine)
    torch.testing.assert_close(score(batch), from_logits(model, batch), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score(batch, frozen), from_logits(frozen, batch), rtol=1e-4, atol=1e-5)
    assert engine.module.training
    assert all(p.grad is None for p in [*model.parameters(), *frozen.parameters()])
