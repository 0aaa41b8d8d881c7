"""What goes by the paper's measure, and the written model beside the whole one with means in place of what goes."""

import pytest
import torch

from leanmill.core.registry import parse_pass
from leanmill.models.config import ModelConfig
from leanmill.trainer.passes.foresight import after_passes
from leanmill.trainer.passes.run import compress
from tests.sparse.minitron.test_minitron import SIZES, best, heads_by_hand, load, rows_of, save, seen
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


@pytest.mark.parametrize("biased", [False, True])
def test_the_written_model_has_means_in_place_of_what_goes(biased, text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, num_hidden_layers=2, attention_bias=biased, mlp_bias=biased)
    options = {"type": "flap", "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = recipe(tmp_path / "in", text, tmp_path, options, attention="eager")
    (report,) = compress(config, tmp_path / "out")
    assert "56 neurons cut to 24, biases in their place" in str(report)
    rows = rows_of(config, tokenizer)
    inputs = {
        name: found[0].flatten(0, -2)
        for name, found in seen(model, rows).items()
        if name.endswith(("o_proj", "down_proj"))
    }
    for name, x in inputs.items():
        module = model.get_submodule(name)
        scores = x.var(0, unbiased=False) * module.weight.detach().square().sum(0)
        if name.endswith("o_proj"):
            heads = torch.tensor(heads_by_hand(scores.view(6, 8).sum(1).sqrt(), 2, 2))
            kept = (heads[:, None] * 8 + torch.arange(8)).flatten()
        else:
            kept = torch.tensor(best(scores, 24))
        stays = torch.zeros(x.shape[1], dtype=torch.bool)
        stays[kept] = True
        mean = x.mean(0)
        module.register_forward_pre_hook(lambda _, x, stays=stays, mean=mean: (torch.where(stays, x[0], mean),))
    small = load(tmp_path / "out")
    assert small.config.attention_bias
    assert small.config.mlp_bias
    with torch.no_grad():
        want, got = model(**rows, use_cache=False).logits, small(**rows, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {}, "nothing is asked for"),
        ("llama", {"intermediate_size": 56}, "has these sizes already"),
        ("qwen3", {"intermediate_size": 0.5}, "has no mlp_bias"),
        ("mixtral", {"intermediate_size": 0.5}, "none of them; give a model"),
    ],
)
def test_requests_that_do_not_fit(family, options, message):
    config = ModelConfig(config={"model_type": family, **SIZES})
    with pytest.raises(ValueError, match=message):
        after_passes(config, [parse_pass({"type": "flap", **options})], seed=0)
