"""Nested MLPs against the paper's equation, sub-model by sub-model, and what is cut out of them."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_pass, parse_technique
from leanmill.core.rules import StepContext
from leanmill.core.sites import Sites
from leanmill.core.technique import InstallContext
from leanmill.moe.matformer.extraction import mixed_widths
from leanmill.recipe.compress import CompressRecipe
from leanmill.trainer.passes.run import compress


SIZES = {"hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "vocab_size": 50, "max_position_embeddings": 32, "bos_token_id": None}
SIZES |= {"eos_token_id": None, "pad_token_id": None}


def build(family="llama", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | changes)).to(dtype)


def install(model, seed=3, **options):
    context = InstallContext(load_frozen_model=lambda path: None, vocab_size=50, seed=seed)
    config = parse_technique({"type": "matformer", **options})
    (rule,) = config.install(Sites(model), context).step_rules
    rule.check()
    return rule


def step_of(index):
    return StepContext(step=index, num_steps=100, num_micro_batches=1)


def sub_mlp(x, gate, up, down, width):
    """The paper's T_i: the first m_i rows and columns of the matrices (eq. 1, with a gate)."""
    return (F.silu(x @ gate[:width].T) * (x @ up[:width].T)) @ down[:, :width].T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("staged", [False, True])
def test_values_and_gradients_are_those_of_the_first_neurons(dtype, staged):
    model = build(dtype=dtype)
    if staged:  # weights that are staged have the same way through the site
        parse_technique({"type": "ternary", "targets": ["mlp.*"]}).install(Sites(model), None)
    rule = install(model)
    mlp = model.model.layers[1].mlp.train()
    x = torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    weights = [getattr(mlp, f"{part}_proj") for part in ("gate", "up", "down")]
    drawn = set()
    for index in range(25):
        rule.begin_step(step_of(index))
        width = round(24 * rule.metrics()["width_share"])
        drawn.add(width)
        used = [site.effective_weight() for site in weights] if staged else [site.weight for site in weights]
        leaves = [x, *(site.weight for site in weights)]
        expected, got = sub_mlp(x, *used, width), mlp(x)
        up = torch.linspace(-1, 1, expected.numel()).reshape(expected.shape).to(dtype)
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}[dtype]
        pairs = zip(
            (got, *torch.autograd.grad(got, leaves, up)),
            (expected, *torch.autograd.grad(expected, leaves, up)),
            strict=True,
        )
        for found, wanted in pairs:
            assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert drawn == {24, 12, 6, 3}


def test_eval_mode_is_the_whole_model():
    model = build()
    ids = torch.arange(10)[None]
    before = model.eval()(ids).logits
    rule = install(model)
    rule.begin_step(step_of(0))
    assert torch.equal(model.eval()(ids).logits, before)


def test_a_draw_depends_on_seed_and_step_alone_and_keeps_its_probabilities():
    rule = install(build(), granularities=[1, 4], probabilities=[3, 1])
    same = install(build(), granularities=[1, 4], probabilities=[0.75, 0.25])
    other = install(build(), seed=4, granularities=[1, 4], probabilities=[3, 1])
    draws = {}
    for each in (rule, same, other):
        draws[each] = []
        for index in range(2000):
            each.begin_step(step_of(index))
            draws[each].append(each.metrics()["width_share"])
    assert draws[rule] == draws[same] != draws[other]
    assert sum(share == 1 for share in draws[rule]) / 2000 == pytest.approx(0.75, abs=0.03)


def test_all_at_once_is_the_mean_over_sub_models():
    """Loss and every gradient, of rows that are told apart."""
    granularities = [1, 2, 8]
    ids = torch.arange(12).reshape(2, 6) % 50
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1), "row_ids": torch.arange(2)}

    def loss(model, batch):
        logits = model.train()(batch["input_ids"]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    together = build(dtype=torch.float64)
    rule = install(together, mode="sum", granularities=granularities)
    (repeated,) = rule.change_batches([batch], step_of(0), None)
    assert repeated["row_ids"].tolist() == [0, 1] * 3
    value = loss(together, repeated)
    value.backward()
    alone = build(dtype=torch.float64)
    single = install(alone, granularities=[1, 2, 8])
    total = 0.0
    for granularity in granularities:
        for around in single.arounds:
            around.widths.fill_(24 // granularity)
        total = total + loss(alone, batch) / 3
    total.backward()
    assert value.item() == pytest.approx(total.item(), abs=1e-12)
    expected = dict(alone.named_parameters())
    for name, parameter in together.named_parameters():
        assert (parameter.grad - expected[name].grad).abs().max() <= 1e-12, name


@pytest.mark.parametrize(("options", "widths"), [
    ({"granularity": 4}, [6, 6]),
    ({"widths": [10, 10]}, [10, 10]),
    ({"widths": [3, 17], "padded": True}, [3, 17]),
    ({"budget": 0.8, "padded": True}, [12, 24]),
])  # fmt: skip
def test_what_is_cut_out_computes_what_was_trained(options, widths, tmp_path):
    model = build("llama", torch.float64, mlp_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            for part in ("gate", "up", "down"):
                getattr(layer.mlp, f"{part}_proj").bias.normal_()
    model.save_pretrained(tmp_path / "whole")
    raw = {"model": {"path": str(tmp_path / "whole")}, "device": "cpu", "passes": [{"type": "mix_n_match", **options}]}
    (report,) = compress(CompressRecipe.model_validate(raw), tmp_path / "part")
    part = AutoModelForCausalLM.from_pretrained(tmp_path / "part", dtype=torch.float64).eval()
    assert part.config.intermediate_size == max(widths)
    assert f"{sum(widths) / 48:.1%}" in str(report)
    rule = install(model)
    for around, width in zip(rule.arounds, widths, strict=True):
        around.widths.fill_(width)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        expected, got = model.train()(ids).logits, part(ids).logits
    assert (expected - got).abs().max() <= 1e-12 * expected.abs().max()


def test_a_budget_mixes_neighbours_the_narrower_first():
    assert mixed_widths(4, 16, 1.0, [1, 2, 4, 8]) == [16] * 4
    assert mixed_widths(4, 16, 0.7, [1, 2, 4, 8]) == [8, 8, 8, 16]
    assert mixed_widths(4, 16, 0.5, [1, 2, 4, 8]) == [8] * 4
    assert mixed_widths(4, 16, 0.49, [1, 2, 4, 8]) == [4, 8, 8, 8]
    assert mixed_widths(4, 16, 0.3, [1, 4]) == [4] * 4
    with pytest.raises(ConfigError, match="type at least 0.25"):
        mixed_widths(4, 16, 0.2, [1, 4])


def test_models_and_options_that_do_not_fit():
    for raw, message in [
        ({"granularities": [1, 1]}, "names one twice"),
        ({"mode": "sum", "probabilities": [1, 1, 1, 1]}, "draws nothing"),
        ({"probabilities": [1]}, "1 probabilities for 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_technique({"type": "matformer", **raw})
    with pytest.raises(ConfigError, match="does not divide the MLP's 24 neurons"):
        install(build(), granularities=[1, 5])
    with pytest.raises(ConfigError, match="has experts"):
        install(build("mixtral", num_local_experts=2))
    with pytest.raises(ConfigError, match=r"gate_up_proj, down_proj, and needs"):
        install(build("phi3"))
    with pytest.raises(ConfigError, match="or another width"):
        install(build(hidden_size=24))
    config = AutoConfig.for_model("llama", **SIZES)
    for raw, message in [
        ({"widths": [3, 12]}, "several; give each layer the same, the nearest is 8, or type padded: true"),
        ({"widths": [3]}, "give 2 numbers of at most 24"),
        ({"granularity": 5}, "granularity 5 does not divide 24"),
    ]:
        with pytest.raises(ConfigError, match=message):
            parse_pass({"type": "mix_n_match", **raw}).surgeon(0).config(config)
    moe = AutoConfig.for_model("mixtral", **SIZES, num_local_experts=2)
    with pytest.raises(ConfigError, match="no dense MLP of one width"):
        parse_pass({"type": "mix_n_match", "granularity": 2}).surgeon(0).config(moe)
    with pytest.raises(ValueError, match="not none"):
        parse_pass({"type": "mix_n_match"})


def test_a_branch_beside_it_is_refused():
    from leanmill.moe.matformer.rules import check_branches

    model = build()
    context = InstallContext(load_frozen_model=lambda path: None, vocab_size=50, seed=0)
    sites = Sites(model)
    parse_technique({"type": "matformer"}).install(sites, context)
    parse_technique({"type": "lora", "rank": 2, "alpha": 2, "where": "branch"}).install(sites, context).add_branches(
        model
    )
    with pytest.raises(ConfigError, match=r"mlp\.down_proj: an output branch.*where: weight"):
        check_branches(model)
