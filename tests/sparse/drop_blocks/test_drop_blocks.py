"""What goes by the papers' measures on a whole model with hooks, and what is written."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from leanmill.core.registry import parse_pass
from leanmill.models.config import ModelConfig
from leanmill.trainer.passes.foresight import after_passes
from leanmill.trainer.passes.run import compress
from tests.sparse.minitron.test_minitron import SIZES, best, rows_of, save, seen
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


ZEROS = {"written_as_zeros": True}


def silenced(model, parts):
    for layer, kind in parts:
        block = model.model.layers[layer]
        if kind in ("attention", "block"):
            block.self_attn.register_forward_hook(lambda _, args, output: (output[0] * 0, *output[1:]))
        if kind in ("mlp", "block"):
            block.mlp.register_forward_hook(lambda _, args, output: output * 0)
    return model


def logits_of(folder, rows, parts=()):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return silenced(model, parts)(**rows, use_cache=False).logits


def js(a, b):
    p, q = a.softmax(-1), b.softmax(-1)
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)).mean() / 2


def angle(a, b):
    return ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).arccos().mean() / torch.pi


@pytest.mark.parametrize(
    ("family", "measure", "kinds", "options"),
    [
        (
            "llama",
            "js_divergence",
            ("attention", "mlp"),
            {"parts": "halves", **ZEROS, "first_layer": 1},
        ),
        pytest.param("gemma2", "angle", ("attention",), {"parts": "attention", **ZEROS}, marks=pytest.mark.slow),
        ("qwen2", "loss", ("block",), {}),
    ],
    ids=["llama", "gemma2", "qwen2"],
)
def test_parts_go_one_after_another(family, measure, kinds, options, text, tokenizer, tmp_path):  # noqa: F811
    save(tmp_path / "in", tokenizer, family, dtype=torch.float32)
    options = {"type": "drop_blocks", "dropped": 2, "order": "greedy", "measure": measure, **options}
    config = recipe(tmp_path / "in", text, tmp_path, options, attention="eager")
    (report,) = compress(config, tmp_path / "out")
    rows = rows_of(config, tokenizer)
    whole, gone = logits_of(tmp_path / "in", rows), []
    for _ in range(2):
        found = {}
        for part in [(layer, kind) for layer in range(options.get("first_layer", 0), 4) for kind in kinds]:
            if part not in gone:
                logits = logits_of(tmp_path / "in", rows, [*gone, part])
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows["input_ids"][:, 1:].flatten())
                found[part] = {"loss": lambda loss=loss: loss, "angle": lambda x=logits: angle(x, whole)}.get(
                    measure, lambda x=logits: js(x, whole)
                )()
        gone.append(min(found, key=found.get))
    written = ", ".join(f"{'MLP' if kind == 'mlp' else kind} {layer}" for layer, kind in gone)
    assert written in str(report)
    want = logits_of(tmp_path / "in", rows, gone)
    torch.testing.assert_close(logits_of(tmp_path / "out", rows), want, rtol=1e-4, atol=1e-4)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(small.model.layers) == (2 if kinds == ("block",) else 4)


def test_blocks_of_least_influence_go(text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, "qwen3", dtype=torch.float32)
    config = recipe(tmp_path / "in", text, tmp_path, {"type": "drop_blocks", "dropped": 0.5}, attention="eager")
    compress(config, tmp_path / "out")
    acts = seen(model, rows_of(config, tokenizer))
    influence = [1 - F.cosine_similarity(*acts[f"model.layers.{i}"], dim=-1).mean() for i in range(4)]
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for layer, index in zip(small.model.layers, best(influence, 2), strict=True):
        assert torch.equal(layer.self_attn.q_proj.weight, model.model.layers[index].self_attn.q_proj.weight)


@pytest.mark.slow
def test_a_silenced_layer_of_experts_adds_nothing(text, tokenizer, tmp_path):  # noqa: F811
    changes = {"num_local_experts": 2, "num_experts_per_tok": 1}
    save(tmp_path / "in", tokenizer, "mixtral", dtype=torch.float32, **changes)
    options = {
        "type": "drop_blocks",
        "dropped": 3,
        "order": "greedy",
        "parts": "mlp",
        **ZEROS,
        "first_layer": 1,
    }
    compress(recipe(tmp_path / "in", text, tmp_path, options), tmp_path / "out")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers
    assert [bool(layer.mlp.experts.down_proj.any()) for layer in small] == [True, False, False, False]
    assert all(bool(layer.self_attn.o_proj.weight.any()) and bool(layer.mlp.gate.weight.any()) for layer in small)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropped": 4}, "drop 1 to 3"),
        ({"dropped": 3, "first_layer": 2}, "drop 1 to 2"),
        ({"dropped": 0.1}, "drop 1 to 3"),
        ({"dropped": 1, "parts": "halves"}, "type written_as_zeros: true"),
        ({"dropped": 1, "parts": "mlp", **ZEROS}, "type order: greedy"),
        ({"dropped": 1, "measure": "loss"}, "measure is for order: greedy"),
    ],
)
def test_requests_that_do_not_fit(options, message):
    config = ModelConfig(config={"model_type": "llama", **SIZES})
    with pytest.raises(ValueError, match=message):
        after_passes(config, [parse_pass({"type": "drop_blocks", **options})], seed=0)


def test_a_pass_that_is_written_out_is_read_again():
    config = parse_pass({"type": "drop_blocks", "dropped": 1})
    assert parse_pass(config.model_dump(mode="json")) == config
