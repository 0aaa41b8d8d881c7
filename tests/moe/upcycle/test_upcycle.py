"""A dense model and the mixture made of it compute the same, to the last bits of fp64 where that is promised."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.core.errors import ConfigError
from leanmill.parallel.launch import Ranks
from leanmill.recipe.compress import CompressRecipe
from leanmill.trainer.passes.run import calibration_rows, compress
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 90,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ROUTERS = ("MixtralTopKRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter", "FlexOlmoTopKRouter", "OlmoeTopKRouter")


def save(folder, family, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | changes)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases that are all alike would hide a mistake
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "mlp" in name and "gate.weight" not in name:
                parameter.mul_(5)
            elif "embed" in name:
                parameter.mul_(50)
    model.save_pretrained(folder)
    return model.eval()


def operate(folder, out, *passes, seed=0):
    raw = {"model": {"path": str(folder)}, "device": "cpu", "seed": seed, "passes": list(passes)}
    return compress(CompressRecipe.model_validate(raw), out)


def router_in_fp64(self, hidden_states):
    """What transformers' routers compute, but for their cast to fp32."""
    logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    weights, index = logits.double().softmax(-1).topk(self.top_k, dim=-1)
    if getattr(self, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights.to(logits.dtype), index


def load(folder, dtype=torch.float64, exact=True):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
    for module in model.modules():
        if exact and type(module).__name__ in ROUTERS:
            module.forward = router_in_fp64.__get__(module)
    return model


@torch.no_grad()
def logits(model):
    torch.manual_seed(1)
    return model(input_ids=torch.randint(0, 90, (2, 13)), use_cache=False).logits


CASES = {
    "llama": ("llama", {}, {"num_experts": 4, "top_k": 2}, "mixtral"),
    "llama tied": ("llama", {"tie_word_embeddings": True, "head_dim": 16}, {"num_experts": 3, "top_k": 1}, "mixtral"),
    "llama in shards": ("llama", {}, {"num_experts": 12, "top_k": 6, "granularity": 3}, "mixtral"),
    "llama shared": (
        "llama",
        {},
        {"num_experts": 8, "top_k": 4, "granularity": 2, "shared_intermediate_size": 16, "first_dense_layers": 1},
        "qwen2_moe",
    ),
    "mistral windows": ("mistral", {"sliding_window": 5}, {"num_experts": 4, "top_k": 4, "granularity": 4}, "mixtral"),
    "mistral windows shared": (
        "mistral",
        {"sliding_window": 5},
        {"num_experts": 4, "top_k": 2, "shared_intermediate_size": 8},
        "qwen2_moe",
    ),
    "qwen2": (
        "qwen2",
        {},
        {"num_experts": 6, "top_k": 2, "granularity": 2, "shared_intermediate_size": 24},
        "qwen2_moe",
    ),
    "qwen3": ("qwen3", {"head_dim": 16}, {"num_experts": 16, "top_k": 8, "granularity": 4}, "qwen3_moe"),
    "qwen3 windows": (
        "qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 0,
            "attention_bias": True,
        },
        {"num_experts": 4, "top_k": 2, "moe_every": 2},
        "qwen3_moe",
    ),
    "olmo2": ("olmo2", {}, {"num_experts": 6, "top_k": 3, "granularity": 3}, "flex_olmo"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_mixture_computes_what_the_dense_model_did(case, tmp_path):
    family, changes, options, target = CASES[case]
    expected = logits(save(tmp_path / "dense", family, **changes))
    (report,) = operate(tmp_path / "dense", tmp_path / "moe", {"type": "upcycle", **options})
    assert "computes what the dense model did" in str(report)
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["model_type"] == target
    got = load(tmp_path / "moe")
    assert expected.std() > 0.05
    assert (logits(got) - expected).abs().max() <= 1e-12 * expected.abs().max()
    # Experts are used, several of them, and transformers' own routers differ by fp32 rounding only.
    as_shipped = logits(load(tmp_path / "moe", exact=False))
    assert (as_shipped - expected).abs().max() <= 1e-5 * expected.abs().max()
    counts = expert_counts(got)
    assert any((layer > 0).sum() > options["top_k"] for layer in counts) or options["top_k"] == options["num_experts"]
    dense_layers = set(range(options.get("first_dense_layers", 0)))
    dense_layers |= {i for i in range(3) if (i + 1) % options.get("moe_every", 1)}
    assert len(counts) == 3 - len(dense_layers)


def expert_counts(model):
    """How many tokens each expert got, for each layer that has some."""
    counts = []
    handles = [
        module.register_forward_hook(
            lambda m, _, out: counts.append(torch.bincount(out[2].flatten(), minlength=m.num_experts))
        )
        for module in model.modules()
        if type(module).__name__ in ROUTERS
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return counts


def test_shards_and_virtual_groups_lie_as_the_paper_says(tmp_path):
    """Expert i is shard i mod G, its router row that of the copy i // G; down_proj alone is scaled."""
    dense = save(tmp_path / "dense", "qwen3", torch.float32).model.layers[1].mlp
    operate(tmp_path / "dense", tmp_path / "moe", {"type": "upcycle", "num_experts": 6, "top_k": 3, "granularity": 3})
    mlp = load(tmp_path / "moe", torch.float32).model.layers[1].mlp
    for expert in range(6):
        shard = slice(16 * (expert % 3), 16 * (expert % 3) + 16)
        gate, up = mlp.experts.gate_up_proj[expert].chunk(2)
        assert torch.equal(gate, dense.gate_proj.weight[shard])
        assert torch.equal(up, dense.up_proj.weight[shard])
        assert torch.equal(mlp.experts.down_proj[expert], dense.down_proj.weight[:, shard] * 3)
    rows = mlp.gate.weight
    assert torch.equal(rows[:3], rows[:1].expand(3, -1))
    assert torch.equal(rows[3:], rows[3:4].expand(3, -1))
    assert not torch.equal(rows[0], rows[3])
    assert rows.std().item() == pytest.approx(0.02, rel=0.4)


def test_the_cube_root_of_the_paper_would_not_keep_a_gated_mlp(tmp_path):
    """What the formula on all three matrices loses; it is why the scale is on down_proj."""
    dense = save(tmp_path / "dense", "llama").model.layers[0].mlp
    x = torch.randn(50, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, third = dense(x), 2 ** (1 / 3)
    gate, up, down = (getattr(dense, f"{part}_proj").weight * third for part in ("gate", "up", "down"))
    wrong = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T / 2
    assert (wrong - expected).norm() > 0.02 * expected.norm()


@pytest.mark.parametrize(("std", "low", "high"), [(0.002, 1e-4, 0.03), (0.05, 0.03, 0.6)])
def test_weights_from_the_whole_softmax_are_near_at_small_routers_only(std, low, high, tmp_path):
    dense = save(tmp_path / "dense", "qwen3", num_hidden_layers=1)
    options = {"num_experts": 8, "top_k": 4, "granularity": 2, "normalised": False, "router_std": std}
    (report,) = operate(tmp_path / "dense", tmp_path / "moe", {"type": "upcycle", **options})
    assert "while its router's probabilities are equal" in str(report)
    x = torch.randn(200, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))[None]
    with torch.no_grad():
        expected, got = dense.model.layers[0].mlp(x), load(tmp_path / "moe").model.layers[0].mlp(x)
    assert low < (got - expected).norm() / expected.norm() < high


def test_what_is_drawn_anew(tmp_path):
    dense = save(tmp_path / "dense", "llama", torch.float32).model.layers[0].mlp
    base = {"type": "upcycle", "num_experts": 4, "top_k": 2, "reinitialised_share": 0.5}
    (report,) = operate(tmp_path / "dense", tmp_path / "neurons", base)
    assert "something else" in str(report)
    operate(tmp_path / "dense", tmp_path / "weights", base | {"reinitialise": "weights", "reinitialised_std": 3.0})
    experts = load(tmp_path / "neurons", torch.float32).model.layers[0].mlp.experts
    kept = []
    for expert in range(4):
        gate, up = experts.gate_up_proj[expert].chunk(2)
        same = (gate == dense.gate_proj.weight).all(1)
        assert same.sum() == 24
        assert torch.equal(same, (up == dense.up_proj.weight).all(1))
        assert torch.equal(same, (experts.down_proj[expert] == dense.down_proj.weight).all(0))
        assert gate[~same].std().item() == pytest.approx(dense.gate_proj.weight[~same].std().item(), rel=0.1)
        kept.append(same)
    assert not torch.equal(kept[0], kept[1])
    experts = load(tmp_path / "weights", torch.float32).model.layers[0].mlp.experts
    changed = experts.down_proj[0] != dense.down_proj.weight
    assert changed.float().mean() == pytest.approx(0.5, abs=0.05)
    assert experts.down_proj[0][changed].std().item() == pytest.approx(3.0, rel=0.1)


def test_the_seed_decides_what_is_drawn(tmp_path):
    save(tmp_path / "dense", "llama", torch.bfloat16)
    config = {"type": "upcycle", "num_experts": 4, "top_k": 2, "reinitialised_share": 0.3}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        operate(tmp_path / "dense", tmp_path / name, config, seed=seed)
    a, b, c = (load(tmp_path / name, "auto").state_dict() for name in "abc")
    assert all(tensor.dtype == torch.bfloat16 and torch.equal(tensor, b[key]) for key, tensor in a.items())
    assert not torch.equal(a["model.layers.0.mlp.gate.weight"], c["model.layers.0.mlp.gate.weight"])
    layers = [a[f"model.layers.{layer}.mlp.gate.weight"] for layer in range(2)]
    assert not torch.equal(*layers)


def test_more_experts_of_a_mixture(tmp_path):
    """At m times the top-k and without noise the function stays; with it and at the old top-k it is another."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 24}
    save(tmp_path / "moe", "qwen3_moe", **sizes, mlp_only_layers=[1])
    exact = {"type": "expert_upcycle", "factor": 3, "top_k": 6, "router_noise": 0.0}
    operate(tmp_path / "moe", tmp_path / "exact", exact)
    source = logits(load(tmp_path / "moe"))
    assert (logits(load(tmp_path / "exact")) - source).abs().max() <= 1e-12 * source.abs().max()
    (report,) = operate(tmp_path / "moe", tmp_path / "more", {"type": "expert_upcycle"})
    assert "4 experts become 8, top 2 (was 2)" in str(report)
    more, old = load(tmp_path / "more"), load(tmp_path / "moe")
    experts, before = more.model.layers[0].mlp, old.model.layers[0].mlp
    assert torch.equal(experts.experts.down_proj, before.experts.down_proj.repeat(2, 1, 1))
    assert torch.equal(experts.gate.weight[:4], before.gate.weight)
    noise = experts.gate.weight[4:] - before.gate.weight
    assert noise.std().item() == pytest.approx(0.01 * before.gate.weight.std().item(), rel=0.3)
    assert (logits(more) - source).abs().max() > 1e-4 * source.abs().max()


def by_hand(folder, batches, copies):
    """Utility of every expert of every sparse layer, experts taken one by one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").train()
    loss = torch.zeros(())
    for batch in batches:
        ids = batch["input_ids"]
        logits = model(input_ids=ids, position_ids=batch["position_ids"], use_cache=False).logits
        loss = loss + F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) / len(batches)
    loss.backward()
    found = {}
    for layer, block in enumerate(model.model.layers):
        if not hasattr(block.mlp, "experts"):
            continue
        parts = [block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj]
        gradient = [sum(part.grad[e].square().sum() for part in parts).sqrt().item() for e in range(4)]
        weight = [sum(part[e].square().sum() for part in parts).sqrt().item() for e in range(4)]
        found[layer] = [g * (g if copies == "gradient" else w) for g, w in zip(gradient, weight, strict=True)]
    return found


@pytest.mark.parametrize("copies", ["gradient", "saliency"])
def test_useful_experts_get_more_copies(copies, text, tokenizer, tmp_path):  # noqa: F811
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 24}
    save(tmp_path / "moe", "qwen3_moe", torch.float32, **sizes, mlp_only_layers=[1], vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "moe")
    raw = {"type": "expert_upcycle", "copies": copies, "most_copies": 3}
    config = recipe(tmp_path / "moe", text, tmp_path, raw)
    one = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    utility = by_hand(tmp_path / "moe", calibration_rows(config, tmp_path / "moe", one), copies)
    (report,) = compress(config, tmp_path / "more")
    more, old = (load(tmp_path / name, torch.float32).model.layers for name in ("more", "moe"))
    assert utility.keys() == {0, 2}
    told = []
    for layer, scores in utility.items():
        best, second = sorted(range(4), key=lambda e: -scores[e])[:2]
        origins = [0, 1, 2, 3, best, best, best, second]
        for name in ("gate_up_proj", "down_proj"):
            assert torch.equal(getattr(more[layer].mlp.experts, name), getattr(old[layer].mlp.experts, name)[origins])
        rows = old[layer].mlp.gate.weight
        assert torch.equal(more[layer].mlp.gate.weight[:4], rows)
        torch.testing.assert_close(
            more[layer].mlp.gate.weight[4:], rows[origins[4:]], rtol=0, atol=0.1 * rows.std().item()
        )
        told.append(f"{layer}: {' '.join(str(origins.count(e)) for e in range(4))}")
    assert str(report).endswith("; ".join(told))


REFUSED = [
    ("gemma2", {"head_dim": 8}, {}, "no mixture of experts with the attention and norms of 'gemma2'.*llama, mistral"),
    ("llama", {"attention_bias": True}, {}, "has attention_bias"),
    ("llama", {"mlp_bias": True}, {}, "has mlp_bias"),
    ("llama", {}, {"first_dense_layers": 1}, "mixtral has no dense layers.*qwen2_moe has a shared expert"),
    ("llama", {}, {"normalised": False}, "always normalises"),
    ("qwen2", {}, {}, "type e.g. shared_intermediate_size"),
    ("qwen3", {}, {"shared_intermediate_size": 8}, "has no shared expert"),
    ("qwen3", {}, {"granularity": 5, "num_experts": 5, "top_k": 5}, "48 neurons for experts, and granularity=5"),
    ("qwen3", {}, {"first_dense_layers": 3}, "leave none of the 3 layers"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, {}, "window in some only"),
    ("mixtral", {"num_local_experts": 2}, {}, "attention and norms of 'mixtral'"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "options", "message"), REFUSED)
def test_models_that_do_not_fit(family, changes, options, message, tmp_path):
    from leanmill.moe.upcycle.config import Upcycle

    config = Upcycle.model_validate({"num_experts": 4, "top_k": 2, **options})
    with pytest.raises(ConfigError, match=message):
        config.surgeon(0).config(AutoConfig.for_model(family, **SIZES | changes))


def test_options_that_do_not_fit():
    from leanmill.core.registry import parse_pass

    for raw, message in [
        ({"num_experts": 4, "top_k": 5}, "top_k=5 of num_experts=4"),
        ({"num_experts": 6, "top_k": 4, "granularity": 4}, "type num_experts=8"),
        ({"num_experts": 8, "top_k": 2, "granularity": 4}, "type top_k=4"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_pass({"type": "upcycle", **raw})
    for raw, message in [
        ({"copies": "gradient", "factor": 5}, "type most_copies=4 or more"),
        ({"most_copies": 2}, "set copies: gradient"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_pass({"type": "expert_upcycle", **raw})
    llama = AutoConfig.for_model("llama", **SIZES)
    with pytest.raises(ConfigError, match="give one of mixtral"):
        parse_pass({"type": "expert_upcycle"}).surgeon(0).config(llama)
    mixtral = AutoConfig.for_model("mixtral", **SIZES, num_local_experts=2)
    with pytest.raises(ConfigError, match="top_k=5 of 4 experts"):
        parse_pass({"type": "expert_upcycle", "top_k": 5}).surgeon(0).config(mixtral)
