"""Importances against the paper's formulas on a whole model, and the written model against the masked one."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_pass
from leanmill.data.build import build_train_data
from leanmill.sparse.structured.cut import heads_in_groups
from leanmill.trainer.passes.foresight import after_passes
from leanmill.trainer.passes.run import compress
from tests.distributed import run_ranks
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


SIZES = {"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 4, "num_attention_heads": 6, "head_dim": 8}
SIZES |= {"num_key_value_heads": 3, "vocab_size": 300, "max_position_embeddings": 64, "bos_token_id": None}
SIZES |= {"eos_token_id": None, "pad_token_id": None}
ALL = {"hidden_size": 0.5, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}


def save(folder, tokenizer, family="llama", dtype=torch.float64, **changes):  # noqa: F811
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # so large that every part matters, and norms not all alike
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


def rows_of(config, tokenizer):  # noqa: F811
    rows = build_train_data(config.data, tokenizer, seed=0).next_rows(8)
    return {"input_ids": rows["input_ids"], "position_ids": rows["position_ids"]}


def seen(model, rows):
    """By module: what it was given first and what it returned, of all rows."""
    found, handles = {}, []
    for name, module in model.named_modules():

        def hook(_, args, kwargs, output, name=name):
            given = args[0] if args else kwargs.get("hidden_states")
            found[name] = (given, output[0] if isinstance(output, tuple) else output)

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(**rows, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def l2_of_means(activations):
    """|| mean over tokens of |a| ||_2 over sequences."""
    return activations.float().abs().mean(1).norm(dim=0)


def best(scores, number):
    return sorted(sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:number])


def chosen(model, rows, after):
    """What stays, by the paper's formulas."""
    acts, layers = seen(model, rows), range(model.config.num_hidden_layers)
    names = [f"model.layers.{i}" for i in layers]
    norms = [acts[f"{n}.{norm}"][1] for n in names for norm in ("input_layernorm", "post_attention_layernorm")]
    hidden = best(sum(map(l2_of_means, norms)), after.hidden_size)
    neurons = [best(l2_of_means(acts[f"{n}.mlp.down_proj"][0]), after.intermediate_size) for n in names]
    of_heads = [l2_of_means(acts[f"{n}.self_attn.o_proj"][0]).view(6, 8).norm(dim=1) for n in names]
    heads = [heads_by_hand(scores, after.num_attention_heads, after.num_key_value_heads) for scores in of_heads]
    influence = [1 - F.cosine_similarity(*(x.float() for x in acts[n]), dim=-1).double().mean() for n in names]
    return hidden, neurons, heads, best(influence, after.num_hidden_layers)


def heads_by_hand(scores, num_heads, num_groups):
    pairs = scores.view(3, 2)
    groups = best(pairs.square().sum(1), num_groups)
    return [2 * group + head for group in groups for head in best(pairs[group], num_heads // num_groups)]


def mask(model, hidden, neurons, heads, layers, *, mean_over_kept):
    """Zero in the big model what goes."""

    def zeros(size, kept):
        m = torch.zeros(size, dtype=torch.float64)
        m[list(kept)] = 1
        return m

    config = model.config
    channels = zeros(config.hidden_size, hidden)

    def after(module, factor):
        module.register_forward_hook(lambda _, __, output: output * factor)

    def before(module, factor):
        module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor,))

    after(model.model.embed_tokens, channels)
    for i, layer in enumerate(model.model.layers):
        before(layer.self_attn.o_proj, zeros(config.num_attention_heads, heads[i]).repeat_interleave(8))
        before(layer.mlp.down_proj, zeros(config.intermediate_size, neurons[i]))
        after(layer.self_attn.o_proj, channels)
        after(layer.mlp.down_proj, channels)
        if i not in layers:
            layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    if mean_over_kept:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm") and module.weight.shape == channels.shape:
                module.forward = lambda x, module=module: (
                    module.weight
                    * x
                    * (x.square().sum(-1, keepdim=True) / channels.sum() + module.variance_epsilon).rsqrt()
                )


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.mark.parametrize(
    ("family", "changes", "options"),
    [
        ("llama", {"tie_word_embeddings": True}, ALL | {"num_hidden_layers": 3}),
        ("qwen3", {}, ALL | {"num_hidden_layers": 0.5, "norms": "all_channels"}),
        pytest.param(
            "qwen2",
            {"max_window_layers": 2, "use_sliding_window": True},
            {"num_hidden_layers": 2, "hidden_size": 0.5},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "gemma2",
            {"query_pre_attn_scalar": 8},
            {"num_attention_heads": 3, "intermediate_size": 0.5},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["llama", "qwen3", "qwen2", "gemma2"],
)
def test_the_written_model_is_the_masked_one(family, changes, options, text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, family, **changes)
    config = recipe(tmp_path / "in", text, tmp_path, {"type": "minitron", **options}, attention="eager")
    (report,) = compress(config, tmp_path / "out")
    small = load(tmp_path / "out")
    rows = rows_of(config, tokenizer)
    kept = chosen(model, rows, small.config)
    assert small.config.head_dim == 8
    mask(model, *kept, mean_over_kept=options.get("norms") != "all_channels" and "hidden_size" in options)
    if getattr(model.config, "layer_types", None):
        assert small.config.layer_types == [model.config.layer_types[i] for i in kept[3]]
    with torch.no_grad():
        want, got = model(**rows, use_cache=False).logits, small(**rows, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert "cut to" in str(report)
    foreseen = after_passes(config.model, config.passes, seed=0).config
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert foreseen[key] == getattr(small.config, key)


def test_heads_by_gradients_are_those_of_a_factor_on_each(text, tokenizer, tmp_path):  # noqa: F811
    """Michel et al., eq. 2: one backward a sequence, here through the columns of the output projection."""
    model = save(tmp_path / "in", tokenizer, dtype=torch.float32)
    options = {"type": "minitron", "num_attention_heads": 3, "head_importance": "gradients"}
    config = recipe(tmp_path / "in", text, tmp_path, options, attention="eager")
    compress(config, tmp_path / "out")
    rows = rows_of(config, tokenizer)
    projections = [layer.self_attn.o_proj for layer in model.model.layers]
    sums = torch.zeros(4, 6)
    for ids, positions in zip(rows["input_ids"], rows["position_ids"], strict=True):
        factors = [torch.ones(6, requires_grad=True) for _ in projections]
        scaled = {
            f"model.layers.{i}.self_attn.o_proj.weight": p.weight.detach() * f.repeat_interleave(8)
            for i, (p, f) in enumerate(zip(projections, factors, strict=True))
        }
        inputs = {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False}
        logits = torch.func.functional_call(model, scaled, (), inputs).logits[0]
        loss = F.cross_entropy(logits[:-1], ids[1:], reduction="sum")
        sums += torch.stack([gradient.abs() for gradient in torch.autograd.grad(loss, factors)])
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for i, scores in enumerate(sums):
        kept = torch.tensor(heads_by_hand(scores, 3, 3))
        want = projections[i].weight.view(48, 6, 8)[:, kept].flatten(1)
        assert torch.equal(small.model.layers[i].self_attn.o_proj.weight, want), i


def test_layers_go_that_the_loss_misses_least(text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, dtype=torch.float32)
    options = {"type": "minitron", "num_hidden_layers": 2, "depth_importance": "loss"}
    config = recipe(tmp_path / "in", text, tmp_path, options, attention="eager")
    compress(config, tmp_path / "out")
    rows, losses = rows_of(config, tokenizer), []
    for layer in model.model.layers:
        forward, layer.forward = layer.forward, lambda hidden_states, *args, **kwargs: hidden_states
        with torch.no_grad():
            logits = model(**rows, use_cache=False).logits[:, :-1]
        losses.append(F.cross_entropy(logits.flatten(0, 1), rows["input_ids"][:, 1:].flatten()))
        layer.forward = forward
    kept = best(losses, 2)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for layer, index in zip(small.model.layers, kept, strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, model.model.layers[index].mlp.up_proj.weight)


def test_experts_keep_their_width(text, tokenizer, tmp_path):  # noqa: F811
    changes = {"num_local_experts": 2, "num_experts_per_tok": 1}
    save(tmp_path / "in", tokenizer, "mixtral", dtype=torch.bfloat16, **changes)
    options = {"type": "minitron", "hidden_size": 24, "num_key_value_heads": 1, "num_hidden_layers": 3}
    compress(recipe(tmp_path / "in", text, tmp_path, options), tmp_path / "out")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert small.model.layers[2].mlp.experts.down_proj.shape == (2, 24, 56)
    assert small.config.num_attention_heads == 2
    assert small.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="cuts the neurons of dense MLPs"):
        compress(
            recipe(tmp_path / "in", text, tmp_path, {"type": "minitron", "intermediate_size": 24}), tmp_path / "no"
        )


def _two(config, out):
    compress(config, out)


@pytest.mark.slow
def test_two_ranks_cut_what_one_process_cuts(text, tokenizer, tmp_path):  # noqa: F811
    save(tmp_path / "in", tokenizer, dtype=torch.float32)
    options = {"type": "minitron", **ALL, "num_hidden_layers": 2, "depth_importance": "loss"}
    config = recipe(tmp_path / "in", text, tmp_path, options, attention="eager")
    compress(config, tmp_path / "one")
    run_ranks(_two, 2, config, tmp_path / "two")
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def test_of_equal_heads_the_first_stay():
    heads, groups = heads_in_groups(torch.ones(12), 4, 4, 2)
    assert groups.tolist() == [0, 1]
    assert heads.tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({}, {}, "nothing is asked for"),
        ({"hidden_size": 48}, {}, "has these sizes already"),
        ({"hidden_size": 64}, {}, "at most 48"),
        ({"num_attention_heads": 4}, {}, "type one of 3, 6"),
        ({"num_hidden_layers": 2, "norms": "all_channels"}, {}, "give hidden_size"),
        ({"hidden_size": 24, "depth_importance": "loss"}, {}, "give num_hidden_layers"),
        ({"hidden_size": 24, "head_importance": "gradients"}, {}, "give num_attention_heads"),
        ({"hidden_size": 0.5}, {"family": "gemma2"}, "multiplies embeddings"),
        ({"hidden_size": 44}, {}, "not a multiple of the number of attention heads"),
        ({"hidden_size": 24}, {"family": "phi3"}, "none of them; give a model"),
        ({"hidden_size": 1.5}, {}, "less than 1"),
    ],
)
def test_requests_that_do_not_fit(options, changes, message):
    from leanmill.models.config import ModelConfig

    raw = {"model_type": changes.get("family", "llama"), **SIZES}
    with pytest.raises(ValueError, match=message):
        after_passes(ModelConfig(config=raw, attention="eager"), [parse_pass({"type": "minitron", **options})], seed=0)
