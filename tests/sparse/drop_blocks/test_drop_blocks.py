"""What goes by the papers' measures on a whole model with hooks, and what is written."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from leanmill.core.registry import parse_pass
from leanmill.models.config import ModelConfig
from leanmill.sparse.drop_blocks.gates import learned_gates
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


def test_blocks_of_lowest_gates_go(text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, "llama", dtype=torch.float32)
    options = {"order": "gates", "gate_steps": 3, "gate_penalty": 4.0, "gate_lr": 0.2, "first_layer": 1}
    config = recipe(tmp_path / "in", text, tmp_path, {"type": "drop_blocks", "dropped": 2, **options})
    (report,) = compress(config, tmp_path / "out")
    rows = rows_of(config, tokenizer)
    opening = torch.ones(3, requires_grad=True)
    adam = torch.optim.Adam([opening], lr=0.2)
    for width in (0.1, 0.1 * 1e-3**0.5, 1e-4):
        gates = opening**2 / (opening**2 + width)
        hidden = model.model.embed_tokens(rows["input_ids"])
        angles = model.model.rotary_emb(hidden, rows["position_ids"])
        for layer, block in enumerate(model.model.layers):
            out = block(hidden, position_embeddings=angles, position_ids=rows["position_ids"])
            hidden = out if layer == 0 else (1 - gates[layer - 1]) * hidden + gates[layer - 1] * out
        logits = model.lm_head(model.model.norm(hidden))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows["input_ids"][:, 1:].flatten())
        adam.zero_grad()
        (loss + 4 * (gates.mean() - 1 / 3) ** 2).backward()
        adam.step()
    halves = [{name: part[half] for name, part in rows.items()} for half in (slice(0, 3), slice(3, None))]
    seen_model = SimpleNamespace(rows=halves, whole=lambda: model.requires_grad_(False), total=lambda tensor: tensor)
    found = learned_gates(seen_model, range(1, 4), open_share=1 / 3, penalty=4.0, num_steps=3, learning_rate=0.2)
    torch.testing.assert_close(found, opening.detach().abs())
    first, second = (1 + int(index) for index in opening.abs().argsort()[:2])
    assert str(report) == f"drop_blocks: without block {first}, block {second}"


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
        ({"dropped": 1, "gate_lr": 0.1}, "gate_lr is for order: gates"),
        ({"dropped": 1, "parts": "mlp", **ZEROS, "order": "gates"}, "gates are those of whole blocks"),
    ],
)
def test_requests_that_do_not_fit(options, message):
    config = ModelConfig(config={"model_type": "llama", **SIZES})
    with pytest.raises(ValueError, match=message):
        after_passes(config, [parse_pass({"type": "drop_blocks", **options})], seed=0)


def test_a_pass_that_is_written_out_is_read_again():
    config = parse_pass({"type": "drop_blocks", "dropped": 1})
    assert parse_pass(config.model_dump(mode="json")) == config
