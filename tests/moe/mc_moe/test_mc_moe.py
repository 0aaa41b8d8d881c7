"""Bits of experts against the paper's objective, and the folder that is written."""

import itertools
import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.core.errors import ConfigError
from leanmill.core.passes import ExpertLayer
from leanmill.core.registry import parse_pass
from leanmill.moe.mc_moe.grid import best_scale, midrise, rounded
from leanmill.moe.mc_moe.program import assign_bits, feasible_bits, total_bits
from leanmill.moe.mc_moe.solver import McMoeSolver
from leanmill.trainer.passes.run import compress
from tests.distributed import run_ranks
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"max_position_embeddings": 64, "vocab_size": 300, "bos_token_id": None, "eos_token_id": None}
MC = {"type": "mc_moe", "average_bits": 2.0, "group_size": 16}


@pytest.mark.parametrize("seed", range(3))
def test_bits_are_the_best_of_all_assignments(seed):
    """Brute force over 3^5 assignments of the paper's program."""
    cost = torch.rand(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1e-9
    for bits in range(8, 15):
        allowed = [a for a in itertools.product((1, 2, 3), repeat=5) if sum(a) == bits and 3 in a and 2 in a]
        best = min(sum(cost[i, b - 1].item() for i, b in enumerate(a)) for a in allowed)
        found = assign_bits(cost, bits)
        assert tuple(found) in allowed
        assert sum(cost[i, b - 1].item() for i, b in enumerate(found)) == pytest.approx(best, rel=1e-6)
    assert feasible_bits(5) == (8, 14)
    with pytest.raises(ValueError, match="cannot have 7 bits"):
        assign_bits(cost, 7)
    assert sum(assign_bits(torch.zeros(5, 3), 9)) == 9, "costs may all be nothing"
    assert total_bits(2.1, 10) == 21


def test_bits_of_many_experts_are_the_best_too():
    """Where bits cost an expert what they are, convex in bits, bits go one by one to whom they help most."""
    gains = torch.rand(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(1, descending=True)[
        0
    ]
    cost = 2 + torch.cat([torch.zeros(64, 1), -gains.cumsum(1)], 1)
    found = assign_bits(cost, 64 + 50)
    best = cost[:, 0].sum() - gains.flatten().topk(50).values.sum()
    assert sum(found) == 114
    assert cost[torch.arange(64), torch.tensor(found) - 1].sum().item() == pytest.approx(best.item(), rel=1e-6)


def layer_of(num_experts=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    experts = [{"gate": draw(24, 16), "up": draw(24, 16), "down": draw(16, 24)} for _ in range(num_experts)]
    hidden = draw(60, 16)
    probabilities = (draw(60, num_experts) + torch.tensor([2.0, 1.0, 0.0, -9.0])).softmax(-1)
    weights, chosen = probabilities.topk(2, -1)
    layer = ExpertLayer(
        index=0,
        num_experts=num_experts,
        read=lambda e: {k: v.clone() for k, v in experts[e].items()},
        activation=F.silu,
        hidden=hidden,
        chosen=chosen,
        weights=weights / weights.sum(-1, keepdim=True),
        total=lambda t: t,
    )
    return layer, experts


def output(layer, experts):
    out = torch.zeros_like(layer.hidden)
    for token in range(len(layer.hidden)):
        for place in range(2):
            e, x = experts[layer.chosen[token, place]], layer.hidden[token]
            out[token] += layer.weights[token, place] * ((F.silu(e["gate"] @ x) * (e["up"] @ x)) @ e["down"].T)
    return out


def test_importance_and_errors_are_the_papers():
    layer, experts = layer_of()
    solver = McMoeSolver(average_bits=2.0, powers=(1.0, 1.5, 2.0), group_size=8, damping=0.01, leaves_out_second=False)
    frequency, weight = solver._importance(layer)
    whole = output(layer, experts)
    for e in range(4):
        hits = layer.chosen == e
        assert frequency[e].item() == pytest.approx(hits.sum().item() / 60)
        assert weight[e].item() == pytest.approx(layer.weights[hits].sum().item() / 60, abs=1e-7)
        errors = solver._errors(layer, e)
        for place, bits in enumerate((1, 2, 3)):
            other = list(experts)
            other[e] = {name: rounded(value, bits, 8) for name, value in experts[e].items()}
            assert errors[place].item() == pytest.approx(
                (output(layer, other) - whole).norm().item(), rel=1e-4, abs=1e-6
            )
    # The powers, each its own: the authors' code takes alpha where gamma belongs.
    errors = torch.stack([solver._errors(layer, e) for e in range(4)])
    cost = (frequency * weight**1.5)[:, None] * errors**2
    assert solver.solve(layer).text == f"bits {' '.join(map(str, assign_bits(cost, 8)))}"


def test_gptq_at_those_bits_loses_less_than_rounding_and_stays_on_its_grid():
    layer, experts = layer_of()
    solver = McMoeSolver(average_bits=2.0, powers=(1.0, 1.5, 2.0), group_size=8, damping=0.01, leaves_out_second=False)
    solution = solver.solve(layer)
    bits = [int(b) for b in solution.text.split()[1:]]
    for e, weights in solution.weights.items():
        for weight in weights.values():
            levels = max(len(group.unique()) for group in weight.reshape(-1, 8))
            assert levels <= 2 ** bits[e]
    whole, plain = (
        output(layer, experts),
        [{k: rounded(v, bits[e], 8) for k, v in experts[e].items()} for e in range(4)],
    )
    solved = [solution.weights[e] for e in range(4)]
    assert (output(layer, solved) - whole).norm() < 0.9 * (output(layer, plain) - whole).norm()


def test_an_expert_without_tokens_is_rounded():
    layer, experts = layer_of()
    assert not (layer.chosen == 3).any()
    solution = McMoeSolver(
        average_bits=2.0, powers=(1, 1.5, 2), group_size=8, damping=0.01, leaves_out_second=False
    ).solve(layer)
    bits = int(solution.text.split()[4])
    assert torch.equal(solution.weights[3]["up"], rounded(experts[3]["up"], bits, 8))


def test_grids_have_all_their_levels():
    values = torch.linspace(-1, 1, 64)[None]
    for bits in (1, 2, 3):
        assert len(midrise(values, best_scale(values, bits), bits).unique()) == 2**bits
    assert torch.equal(midrise(torch.zeros(1, 4), torch.zeros(1, 1), 2), torch.zeros(1, 4))
    one = torch.tensor([[3.0, -1.0]])
    assert torch.equal(midrise(one, best_scale(one, 1), 1), torch.tensor([[2.0, -2.0]]))


def save(folder, family, dtype=torch.float32):
    sizes = {"num_experts_per_tok": 2, "intermediate_size": 48}
    sizes |= {"num_local_experts": 4} if family == "mixtral" else {"num_experts": 4, "norm_topk_prob": True}
    if family != "mixtral":
        sizes |= {"moe_intermediate_size": 16, "mlp_only_layers": [1], "head_dim": 16}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | sizes)).to(dtype)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("family", "dtype"), [("mixtral", torch.float32), ("qwen3_moe", torch.bfloat16)])
def test_what_is_written_loads_and_only_experts_change(family, dtype, text, tokenizer, tmp_path):  # noqa: F811
    before = save(tmp_path / "in", family, dtype)
    tokenizer.save_pretrained(tmp_path / "in")
    attention = {"type": "gptq", "weight_bits": 4, "group_size": 16, "targets": ["self_attn.*"]}
    reports = compress(recipe(tmp_path / "in", text, tmp_path, MC, attention), tmp_path / "out")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    told = [str(report) for report in reports if "mc_moe" in str(report)]
    assert len(told) == (2 if family == "mixtral" else 1)
    assert json.loads((tmp_path / "out" / "leanmill.json").read_text())["reports"] == told
    bits = [int(word) for word in told[0].split("bits ")[1].split()]
    assert sum(bits) == 8
    experts = after.model.layers[0].mlp.experts
    for e in range(4):
        for weight in (experts.gate_up_proj[e], experts.down_proj[e]):
            assert max(len(group.unique()) for group in weight.reshape(-1, 16)) <= 2 ** bits[e]
    old = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, old[name]) == (
            "experts" not in name and "self_attn" not in name or "norm" in name
        )


def _two(config, out):
    compress(config, out)


def test_two_ranks_give_what_one_process_gives(text, tokenizer, tmp_path):  # noqa: F811
    save(tmp_path / "in", "mixtral")
    tokenizer.save_pretrained(tmp_path / "in")
    config = recipe(tmp_path / "in", text, tmp_path, MC)
    alone = [str(report) for report in compress(config, tmp_path / "one")]
    run_ranks(_two, 2, config, tmp_path / "two")
    assert json.loads((tmp_path / "two" / "leanmill.json").read_text())["reports"] == alone
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    for name, value in one.items():
        assert (value - two[name]).norm() <= 0.02 * value.norm(), name


def test_requests_that_do_not_fit(text, tokenizer, tmp_path):  # noqa: F811
    mixtral = AutoConfig.for_model("mixtral", **SIZES, intermediate_size=48, num_local_experts=4)
    with pytest.raises(
        ConfigError, match=r"gives 4 experts 6 bits.*take 7 to 11; type average_bits between 1.75 and 2.75"
    ):
        parse_pass(MC | {"average_bits": 1.5}).solver().check(mixtral)
    with pytest.raises(ConfigError, match="group_size 32 does not divide the experts' 48 features"):
        parse_pass(MC | {"group_size": 32}).solver().check(mixtral)
    save(tmp_path / "in", "mixtral")
    tokenizer.save_pretrained(tmp_path / "in")
    with pytest.raises(ConfigError, match=r"experts are stacked; type targets: \['self_attn"):
        compress(
            recipe(tmp_path / "in", text, tmp_path, {"type": "wanda", "num_kept": 2, "group_size": 4}), tmp_path / "x"
        )
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES, intermediate_size=48))
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match="'llama' is none; give one of mixtral"):
        compress(recipe(tmp_path / "dense", text, tmp_path, MC), tmp_path / "x")
