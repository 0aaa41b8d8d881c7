"""What is taken of a branch, against the equations written out; folders; phases; and what is refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.core.errors import ConfigError, RunError
from leanmill.distill.branch_merge.fuse import stands_out
from leanmill.recipe.compress import CompressRecipe
from leanmill.recipe.io import validate_recipe
from leanmill.trainer.passes.run import compress


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "vocab_size": 50, "max_position_embeddings": 32}


def expected(mine, other):
    """Weight by weight, as arXiv:2503.04872's released merge has it."""
    scores = torch.empty_like(mine)
    for row in range(len(mine)):
        p = other[row].exp() / other[row].exp().sum() + 1e-8
        q = mine[row].exp() / mine[row].exp().sum() + 1e-8
        divergence = sum(p[i] * torch.log(p[i] / q[i]) for i in range(len(p)))
        scores[row] = (other[row] - mine[row]).abs() * divergence
    ordered = scores.flatten().sort().values
    first, median, third = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    kept = scores >= median + 1.5 * (third - first)
    return torch.where(kept, other, mine), kept


@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (16, 8)])
def test_what_stands_out_is_taken(shape):
    torch.manual_seed(0)
    mine = torch.randn(shape)
    other = mine + 0.3 * torch.randn(shape) ** 3
    taken = stands_out(mine, other)
    _, kept = expected(mine, other)
    assert torch.equal(taken, kept)
    assert 0 < taken.sum() < taken.numel()
    assert stands_out(mine, mine).all()  # all are as important: taken or not is the same
    assert stands_out(mine[0], other[0]).shape == shape[1:]  # a norm's


def save(folder, seed, start=None, **changes):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES | changes))
    if start is not None:
        with torch.no_grad():
            for parameter, begun in zip(model.parameters(), start.parameters(), strict=True):
                parameter.copy_(begun + 0.1 * torch.randn_like(begun) ** 3)
    model.save_pretrained(folder)
    return model


def merged(path, out, *models):
    passes = [{"type": "branch_merge", "models": [str(model) for model in models]}]
    recipe = CompressRecipe.model_validate({"device": "cpu", "model": {"path": str(path)}, "passes": passes})
    return compress(recipe, out)


def test_branches_are_merged_in_one_after_another(tmp_path):
    first = save(tmp_path / "a", 0)
    second, third = save(tmp_path / "b", 1, first), save(tmp_path / "c", 2, first)
    (report,) = merged(tmp_path / "a", tmp_path / "out", tmp_path / "b", tmp_path / "c")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    b, c, shares = second.state_dict(), third.state_dict(), []
    for name, mine in first.state_dict().items():
        wanted = mine
        for other in (b[name], c[name]):
            rows = [tensor.view(-1, tensor.shape[-1]) for tensor in (wanted, other)]
            wanted, kept = expected(*rows)
            shares.append((int(kept.sum()), kept.numel()))
            wanted = wanted.view_as(mine)
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=0)
    taken = sum(kept for kept, _ in shares[::2]) / sum(number for _, number in shares[::2])
    assert f"took {taken:.1%} of the weights of {tmp_path / 'b'}" in str(report)


def test_other_models_are_refused(tmp_path):
    model = save(tmp_path / "a", 0)
    save(tmp_path / "wide", 0, intermediate_size=32)
    with pytest.raises(ConfigError, match=r"is \[16, 32\] and the model's \[16, 24\]"):
        merged(tmp_path / "a", tmp_path / "out", tmp_path / "wide")
    save(tmp_path / "deep", 0, num_hidden_layers=3)
    with pytest.raises(ConfigError, match="differ in 9 tensors"):
        merged(tmp_path / "a", tmp_path / "out", tmp_path / "deep")
    with pytest.raises(ConfigError, match="nothing is no model folder"):
        merged(tmp_path / "a", tmp_path / "out", tmp_path / "nothing")
    with pytest.raises(ConfigError, match="names a phase, and this recipe has none"):
        merged(tmp_path / "a", tmp_path / "out", "phase:b")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "b")
    with pytest.raises(RunError, match="holds what is not finite"):
        merged(tmp_path / "a", tmp_path / "out", tmp_path / "b")
    assert not (tmp_path / "out").exists()


def test_a_phase_merges_what_earlier_ones_left():
    def branch(name):
        return {"name": name, "start_from": "base", "overrides": {"train.steps": 1}}

    merging = {"name": "merge", "start_from": "code", "passes": [{"type": "branch_merge", "models": ["phase:maths"]}]}
    raw = {"name": "run", "model": {"config": {"model_type": "llama"} | SIZES}, "data": {"sequence_length": 16}}
    recipe = validate_recipe({**raw, "phases": [branch("code"), branch("maths"), merging]})
    assert recipe.phases_read_by(2) == [1]
    assert recipe.passes_of(2)[0].models == ["runs/run/phases/02-maths/model"]
    with pytest.raises(ConfigError, match=r"phases\.1 \(merge\): phase:maths must name a phase before this one"):
        validate_recipe({**raw, "phases": [branch("code"), merging]})
