"""Distances to a teacher's vectors against their equations, and what is refused."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from leanmill.core.account import Account, Scales
from leanmill.core.around import put_around
from leanmill.core.errors import ConfigError
from leanmill.core.pooling import Pooling
from leanmill.parallel.launch import Ranks
from leanmill.sentences.embedding_distill.match import EmbeddingMatch, text_shares
from tests.sentences.pairs import recipe_of, save_teacher, train


class Encoder(torch.nn.Module):
    def forward(self, hidden):
        return {"last_hidden_state": hidden * 1.0}


class Output(dict):
    last_hidden_state = property(lambda self: self["last_hidden_state"])


class Wrapped(Encoder):
    def forward(self, hidden):
        return Output(last_hidden_state=hidden * 1.0)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("pooling", [Pooling("mean"), Pooling("cls", normalise=True)])
@pytest.mark.parametrize("has_map", [False, True])
def test_loss_and_gradients_are_those_of_the_equation(kind, pooling, has_map):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[3, 2, 0], [1, 5, 4], [2, 2, 2]])
    labels = torch.full((3, 15), -100)
    labels[:2, 0] = 1  # the third row only stands in for a missing one
    batch = {"text_lengths": lengths, "labels": labels}
    is_token = torch.arange(5) < lengths.flatten()[:, None]
    width = 6 if has_map else 4
    hidden = torch.randn(9, 5, 4, generator=generator, requires_grad=True)
    target = torch.randn(9, width, generator=generator)
    weight = torch.randn(6, 4, generator=generator)
    scales = Scales()
    scales.token.fill_(1.0)
    account = Account("embedding_distill", "token", 1.0, scales)
    match = EmbeddingMatch(
        account, pooling=pooling, kind=kind, map_shape=(6, 4) if has_map else None, device=torch.device("cpu")
    )
    if has_map:
        match.weight.data.copy_(weight)
    model = Wrapped()
    put_around(model, match)
    model.train()
    match.target, match.is_token, match.shares = target, is_token, text_shares(batch)
    (model(hidden).last_hidden_state * 0.0).sum().backward()

    again = hidden.detach().clone().requires_grad_()
    mapped_by = weight.clone().requires_grad_()
    total = 0.0
    for row in range(2):
        texts = [t for t in range(3) if lengths[row, t] > 0]
        for text in texts:
            states = again[3 * row + text, : lengths[row, text]]
            vector = states[0] if pooling.kind == "cls" else states.mean(0)
            vector = vector / vector.norm() if pooling.normalise else vector
            vector = mapped_by @ vector if has_map else vector
            goal = target[3 * row + text]
            away = 1 - F.cosine_similarity(vector, goal, dim=0) if kind == "cosine" else (vector - goal).pow(2).mean()
            total = total + away / len(texts)
    total.backward()
    torch.testing.assert_close(account.sums[0], total.detach())
    torch.testing.assert_close(hidden.grad, again.grad)
    if has_map:
        torch.testing.assert_close(match.weight.grad, mapped_by.grad)


def test_other_widths_without_a_map_are_refused(tmp_path):
    technique = {"type": "embedding_distill", "teacher": save_teacher(tmp_path), "linear_map": "never"}
    recipe = recipe_of([technique], {"type": "single"}, num_micro_batches=1, world_size=1)
    one = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="vectors of 40 entries and the student of 32.*linear_map: where_needed"):
        train(recipe, one, num_micro_batches=1)


def test_another_vocabulary_is_refused(tmp_path):
    technique = {"type": "embedding_distill", "teacher": save_teacher(tmp_path)}
    recipe = recipe_of([technique], {"type": "single"}, num_micro_batches=1, world_size=1, model={"vocab_size": 70})
    one = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="vocabulary of 61 and the student one of 70"):
        train(recipe, one, num_micro_batches=1)
