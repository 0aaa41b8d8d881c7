"""M-FAC beside inverses of Fisher matrices that are written out, and gradients beside one backward a row."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from leanmill.core.registry import parse_pass
from leanmill.parallel.launch import Ranks
from leanmill.trainer.passes.gradients import WeightGradients
from leanmill.trainer.passes.run import compress
from tests.distributed import run_ranks
from tests.sparse.minitron.test_minitron import rows_of, save
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


def draw(num_rows, num_out, num_in):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(num_in, num_in, generator=generator)
    gradients = torch.randn(num_rows, num_out, num_in, generator=generator) @ mix
    return torch.randn(num_out, num_in, generator=generator), gradients * 1e-3


def written_out(weight, gradients, damping, block_size, keep):
    """One round: `keep` is given the scores."""
    weight, gradients = weight.double(), gradients.double()
    ridge = damping * gradients.square().mean()
    score, inverses = torch.empty_like(weight), {}
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], block_size):
            g = gradients[:, row, start : start + block_size]
            fisher = ridge * torch.eye(g.shape[1]) + g.T @ g / len(g)
            inverses[row, start] = inverse = torch.linalg.inv(fisher)
            score[row, start : start + block_size] = weight[row, start : start + block_size] ** 2 / inverse.diagonal()
    kept, found = keep(score), weight.clone()
    for (row, start), inverse in inverses.items():
        for i in range(len(inverse)):
            if not kept[row, start + i]:
                move = weight[row, start + i] / inverse[i, i] * inverse[i]
                found[row, start : start + block_size] -= move
    return (found * kept).float(), kept


def highest(count):
    def keep(score):
        kept = torch.zeros(score.numel(), dtype=torch.bool)
        kept[score.flatten().argsort(descending=True)[:count]] = True
        return kept.view_as(score)

    return keep


@pytest.mark.parametrize(("shape", "block_size"), [((3, 11), 4), ((5, 8), 128), ((1, 6), 1)])
@pytest.mark.parametrize("num_rows", [1, 4, 20])
def test_one_round_is_the_papers(num_rows, shape, block_size):
    weight, gradients = draw(num_rows, *shape)
    options = {"type": "mfac", "sparsity": 0.5, "rounds": 1, "block_size": block_size, "damping": 0.1}
    got = parse_pass(options).solver().solve(weight.clone(), gradients.clone()).weight
    want, kept = written_out(weight, gradients, 0.1, block_size, highest(weight.numel() - weight.numel() // 2))
    assert torch.equal(got != 0, kept)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_groups_keep_their_number():
    weight, gradients = draw(6, 4, 16)
    options = {"type": "mfac", "num_kept": 2, "group_size": 4, "block_size": 8}
    got = parse_pass(options).solver().solve(weight.clone(), gradients.clone()).weight

    def keep(score):
        groups = score.unflatten(1, (-1, 4))
        return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, groups.topk(2).indices, True).flatten(1)

    want, kept = written_out(weight, gradients, 0.01, 8, keep)
    assert torch.equal(got != 0, kept)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_rounds_prune_the_same_share_of_what_is_left():
    weight, gradients = draw(6, 4, 10)
    options = {"type": "mfac", "sparsity": 0.75, "rounds": 2, "block_size": 5}
    got = parse_pass(options).solver().solve(weight.clone(), gradients.clone()).weight
    ridge = 0.01 * gradients.square().mean()
    first, kept = written_out(weight, gradients, 0.01, 5, highest(20))
    left = gradients * kept
    damping = float(ridge / left.square().mean())  # it stays, while gradients become fewer
    want, _ = written_out(first, left, damping, 5, lambda score: highest(10)(torch.where(kept, score, -1.0)))
    assert int((got != 0).sum()) == 10
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_the_loss_changes_less_than_by_magnitude():
    weight, gradients = draw(64, 8, 32)

    def change(pruned):
        return float(torch.einsum("noi,oi->no", gradients, pruned - weight).square().sum())

    solver = parse_pass({"type": "mfac", "sparsity": 0.5, "rounds": 16}).solver()
    pruned = solver.solve(weight.clone(), gradients.clone()).weight
    largest = weight * highest(128)(weight.abs())
    assert change(pruned) < 0.6 * change(largest)


def test_without_gradients_magnitudes_decide():
    weight, gradients = draw(3, 4, 8)
    for nothing in (torch.zeros_like(gradients), gradients * 0 + 1e-30):
        got = parse_pass({"type": "mfac", "sparsity": 0.5}).solver().solve(weight.clone(), nothing).weight
        assert got.isfinite().all()
    got = parse_pass({"type": "mfac", "sparsity": 0.5}).solver().solve(weight.clone(), torch.zeros_like(gradients))
    torch.testing.assert_close(got.weight, weight * highest(16)(weight.abs()))


def gradients_of(config, batches, names, world_size):
    rank = torch.distributed.get_rank() if world_size > 1 else 0
    ranks = Ranks(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))
    found = WeightGradients(config, batches[rank::world_size], ranks)
    return found.of_each_row(names), found.mean_squares(names)


def test_layers_are_solved_by_the_gradient_of_each_row(text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, dtype=torch.float32, num_hidden_layers=2)
    options = {"type": "mfac", "num_kept": 2, "group_size": 4, "targets": ["down_proj", "q_proj"]}
    config = recipe(tmp_path / "in", text, tmp_path, options)
    compress(config, tmp_path / "out")
    rows = rows_of(config, tokenizer)
    name = "model.layers.1.mlp.down_proj"
    weight, gradients = model.get_submodule(name).weight, []
    for ids, positions in zip(rows["input_ids"], rows["position_ids"], strict=True):
        logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
        gradients.append(torch.autograd.grad(F.cross_entropy(logits[:-1], ids[1:]), weight)[0])
    want = parse_pass(options).solver().solve(weight.detach().clone(), torch.stack(gradients)).weight
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_submodule(name).weight
    assert ((after == 0) == (want == 0)).float().mean() > 0.99
    torch.testing.assert_close(
        after[(after != 0) & (want != 0)], want[(after != 0) & (want != 0)], rtol=1e-3, atol=1e-3
    )

    # Another block's layers alone: there is nothing to see of this one.
    of_one = recipe(tmp_path / "in", text, tmp_path, options | {"targets": ["layers.0.mlp.down_proj"]})
    compress(of_one, tmp_path / "one")
    left = AutoModelForCausalLM.from_pretrained(tmp_path / "one").get_submodule(name).weight
    assert torch.equal(left, weight)

    names = [name, "model.layers.0.mlp.down_proj"]
    batches = [{key: value[i : i + 2] for key, value in rows.items()} for i in range(0, 8, 2)]
    one = gradients_of(config.model, batches, names, 1)
    torch.testing.assert_close(one[0][name], torch.stack(gradients), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(one[1][name], one[0][name].square().mean(0), rtol=1e-5, atol=1e-12)
    order = [0, 1, 4, 5, 2, 3, 6, 7]  # a rank has every other batch
    for two in run_ranks(gradients_of, 2, config.model, batches, names, 2):
        for each in names:
            torch.testing.assert_close(two[0][each], one[0][each][order], rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(two[1][each], one[1][each], rtol=1e-4, atol=1e-10)
