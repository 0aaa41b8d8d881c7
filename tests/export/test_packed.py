"""Linear weights that stay packed: exact codes, what is left plain, and folders that are loaded back."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.site import LinearSite
from leanmill.core.sites import iter_sites
from leanmill.export import export_model, load_packed
from leanmill.export.compare import sample_logits
from leanmill.export.packed_layers import PackedEmbedding, PackedLinear
from leanmill.quant.int_quant.stage import IntWeights
from leanmill.quant.lsq.stage import LsqStage
from leanmill.quant.ternary.stage import TernaryStage
from leanmill.sparse.nm_sparsity.stage import NMSparsityStage
from leanmill.trainer.rebuild import rebuild
from tests.export.checkpoints import checkpoint_of


def lsq(weight, bits, kind, granularity, group=None):
    stage = LsqStage(weight, bits, kind, granularity, group)
    stage.initialise(weight)
    return stage


STAGES = {
    "ternary": lambda w: TernaryStage(),
    "ternary rows": lambda w: TernaryStage("twn", "row"),
    "int4 groups": lambda w: IntWeights(4, "mse", "group", 8),
    "int3": lambda w: IntWeights(3, granularity="tensor"),
    "lsq signed": lambda w: lsq(w, 4, "signed", "row"),
    "lsq midrise": lambda w: lsq(w, 2, "midrise", "group", 8),
    "lsq 1 bit": lambda w: lsq(w, 1, "midrise", "tensor"),
    "lsq 8 bits": lambda w: lsq(w, 8, "signed", "tensor"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", STAGES)
def test_a_packed_layer_holds_and_computes_the_staged_weight(name, bias, dtype):
    torch.manual_seed(0)
    site = LinearSite.adopt(nn.Linear(24, 13, bias=bias), "layer")
    site.put(STAGES[name](site.weight))
    weight = site.effective_weight().detach()
    codes = site.weight_stages()[-1].codes(site.weight)
    packed = PackedLinear.of(codes, site.bias, int8_activations=False)
    torch.testing.assert_close(packed.weight_values(), weight, rtol=1e-6, atol=1e-7)
    tokens = torch.randn(2, 5, 24, dtype=dtype)
    expected = torch.nn.functional.linear(tokens.float(), weight, site.bias)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(packed(tokens).float(), expected.detach(), **tolerance)


def test_codes_of_a_masked_weight_keep_its_zeros():
    site = LinearSite.adopt(nn.Linear(16, 4, bias=False), "layer")
    site.put(NMSparsityStage(2, 4))
    site.put(IntWeights(4))
    codes = site.weight_stages()[-1].codes(site.weight_stages()[0](site.weight))
    packed = PackedLinear.of(codes, None, int8_activations=False)
    assert ((packed.weight_values() != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all()
    torch.testing.assert_close(packed.weight_values(), site.effective_weight().detach(), rtol=1e-6, atol=1e-7)


CASES = {
    "ternary": ([{"type": "ternary"}], 1 / 8),
    "ternary, int8 activations": ([{"type": "ternary", "activation_bits": 8}], 1 / 8),
    "2:4 and int4": ([{"type": "nm_sparsity"}, {"type": "int_quant", "weight_bits": 4}], 0.4),
    "lsq and lora": ([{"type": "lsq", "weight_bits": 2}, {"type": "lora", "rank": 2}], 0.3),
}


@pytest.mark.parametrize("name", CASES)
def test_a_folder_computes_what_was_trained(name, tmp_path):
    techniques, share = CASES[name]
    checkpoint = checkpoint_of(tmp_path, "llama", techniques)[1]
    trained = rebuild(checkpoint).model
    names = [name for name, site in iter_sites(trained) if isinstance(site, LinearSite)]
    expected = sample_logits(trained)
    report = export_model(checkpoint, tmp_path / "out", to="packed")
    assert report.format == "packed"
    assert f"{len(names)} weights packed" in str(report)
    model = load_packed(tmp_path / "out")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    assert sorted(layers) == sorted(names)
    assert all(layer.packed.nbytes <= share * 2 * layer.in_features * layer.out_features for layer in layers.values())
    if "int8" not in name:
        for kind, logits in sample_logits(model).items():
            torch.testing.assert_close(logits, expected[kind], rtol=1e-4, atol=1e-4)
    else:
        assert all(layer.int8_activations for layer in layers.values())
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", use_safetensors=True)


def test_activations_may_be_left_out(tmp_path):
    checkpoint = checkpoint_of(tmp_path, "llama", [{"type": "ternary", "activation_bits": 8}])[1]
    export_model(checkpoint, tmp_path / "out", to="packed", activations="float")
    model = load_packed(tmp_path / "out")
    assert not any(layer.int8_activations for layer in model.modules() if isinstance(layer, PackedLinear))


@pytest.mark.parametrize(
    ("techniques", "message"),
    [
        ([{"type": "nm_sparsity"}], "nothing to pack; use --to hf"),
        ([{"type": "quest", "weight_bits": 4, "activation_bits": None}], "without a rotation"),
        ([{"type": "int_quant", "weight_bits": 4, "activation_bits": 8}], "--activations float"),
    ],
)
def test_what_has_no_packed_form_is_refused(techniques, message, tmp_path):
    checkpoint = checkpoint_of(tmp_path, "llama", techniques)[1]
    with pytest.raises(ConfigError, match=message):
        export_model(checkpoint, tmp_path / "out", to="packed")
    assert not (tmp_path / "out").exists()


def test_another_weight_or_another_layer_is_found(tmp_path, monkeypatch):
    checkpoint = checkpoint_of(tmp_path, "llama", [{"type": "ternary"}])[1]
    plain = PackedLinear.of

    def wrong(codes, bias, *, int8_activations):
        layer = plain(codes, bias, int8_activations=int8_activations)
        layer.scales = layer.scales * 1.01
        return layer

    monkeypatch.setattr(PackedLinear, "of", wrong)
    with pytest.raises(RunError, match="is not the trained weight"):
        export_model(checkpoint, tmp_path / "out", to="packed")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_none_or_lacks_a_tensor_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no packed\.json"):
        load_packed(tmp_path)
    checkpoint = checkpoint_of(tmp_path / "run", "llama", [{"type": "ternary"}])[1]
    export_model(checkpoint, tmp_path / "out", to="packed")
    layers = json.loads((tmp_path / "out/packed.json").read_text())
    (tmp_path / "out/packed.json").write_text(json.dumps(dict(list(layers.items())[1:])))
    with pytest.raises(RunError, match="in one of packed.safetensors and config.json only"):
        load_packed(tmp_path / "out")


PACKINGS = {
    "int2": ({"type": "ternary"}, 2, 2),
    "int4": ({"type": "int_quant", "weight_bits": 4, "granularity": "group", "group_size": 32}, 4, 4),
    "int8": ({"type": "int_quant", "weight_bits": 8}, 8, 8),
    "ternary": ({"type": "int_quant", "weight_bits": 2}, "ternary", 1.6),
    "binary": ({"type": "lsq", "weight_bits": 1, "grid": "midrise"}, 1, 1),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_files_have_the_bytes_that_codes_and_scales_come_to(packing, tmp_path):
    technique, encoding, bits = PACKINGS[packing]
    technique = {**technique, "targets": ["*_proj", "embed_tokens", "lm_head"]}
    sizes = {"hidden_size": 160, "intermediate_size": 320, "num_attention_heads": 4, "head_dim": 40, "vocab_size": 4096}
    checkpoint = checkpoint_of(tmp_path, "llama", [technique], **sizes)[1]
    trained = rebuild(checkpoint).model
    staged = {name: site.effective_weight().detach() for name, site in iter_sites(trained)}
    report = export_model(checkpoint, tmp_path / "out", packing=packing)
    assert report.format == f"packed {packing}"
    model = load_packed(tmp_path / "out")
    theory = sum(4 * parameter.numel() for parameter in model.parameters())
    for name, weight in staged.items():
        layer = model.get_submodule(name)
        assert layer.encoding == encoding
        # Codes come back bit for bit, and with them the weight.
        torch.testing.assert_close(layer.weight_values(), weight.float(), rtol=1e-6, atol=0)
        if name != "lm_head":
            groups = technique.get("group_size") or weight.shape[1]
            theory += weight.numel() * bits / 8 + 4 * weight.numel() / groups
    size = (tmp_path / "out/packed.safetensors").stat().st_size
    assert size == pytest.approx(theory, rel=0.03)
    assert isinstance(model.model.embed_tokens, PackedEmbedding)
    assert model.lm_head.packed is model.model.embed_tokens.packed
    found, expected = sample_logits(model), sample_logits(trained)
    for kind, logits in found.items():
        torch.testing.assert_close(logits, expected[kind], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("to", "packing", "technique", "message"),
    [
        ("hf", "int2", {"type": "int_quant", "weight_bits": 4}, r"int2 takes 0 to 3; type --packing int4"),
        ("hf", "binary", {"type": "ternary"}, r"binary takes 0 to 1; type --packing ternary"),
        ("hf", "int4", {"type": "nm_sparsity"}, "nothing to pack; use --to hf"),
        ("hf", "int5", {"type": "ternary"}, r"unknown packing 'int5'; did you mean int"),
        ("packed", "int4", {"type": "ternary"}, "--packing int4 is a form of --to hf, not of --to packed"),
    ],
)
def test_what_a_packing_does_not_hold_is_refused(to, packing, technique, message, tmp_path):
    checkpoint = checkpoint_of(tmp_path, "llama", [technique])[1]
    with pytest.raises(ConfigError, match=message):
        export_model(checkpoint, tmp_path / "out", to=to, packing=packing)
    assert not (tmp_path / "out").exists()


def test_inputs_rounded_in_training_are_rounded_whatever_the_encoding(tmp_path):
    checkpoint = checkpoint_of(tmp_path, "llama", [{"type": "ternary", "activation_bits": 8}])[1]
    export_model(checkpoint, tmp_path / "out", packing="int4")
    layer = load_packed(tmp_path / "out").model.layers[0].mlp.up_proj
    tokens = torch.randn(3, 32)
    scale = 127 / tokens.abs().amax(-1, keepdim=True)
    expected = ((tokens * scale).round() / scale) @ layer.weight_values().t()
    torch.testing.assert_close(layer(tokens), expected, rtol=1e-5, atol=1e-6)
