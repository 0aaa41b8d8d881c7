"""Weights of small floats that stay packed: codes bit for bit, bytes, products, and the library's own reading."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from leanmill.core.errors import ConfigError
from leanmill.core.site import LinearSite
from leanmill.core.sites import iter_sites
from leanmill.export import export_model, load_packed
from leanmill.export.compare import sample_logits
from leanmill.export.float_layers import FloatEmbedding, FloatLinear, form_of
from leanmill.kernels.packing.elements import element_levels, pack_elements, unpack_elements
from leanmill.quant.fp_quant.formats import candidates_of, format_of
from leanmill.quant.fp_quant.stage import make_weights
from leanmill.sparse.nm_sparsity.stage import NMSparsityStage
from leanmill.trainer.rebuild import rebuild
from tests.export.checkpoints import checkpoint_of


FORMS = {
    "mxfp4": (None, "mxfp4"),
    "nvfp4": (None, "nvfp4"),
    "mxfp6_e2m3": (None, "mxfp6_e2m3"),
    "mxfp6_e3m2": (None, "mxfp6_e3m2"),
    "mxfp8_e4m3": (None, "mxfp8_e4m3"),
    "mxfp8_e5m2": (None, "mxfp8_e5m2"),
    "mxint4": (None, "e0m3"),
    "mxint8": (None, "e0m7"),
    "e2m1": ("mse", "e2m1"),
    "e3m0": ("absmax", "e3m0"),
    "e4m3": ("none", "e4m3"),
    "fp4": ("absmax", None),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_layer_holds_and_computes_the_staged_weight(name):
    torch.manual_seed(0)
    scale, form = FORMS[name]
    site = LinearSite.adopt(nn.Linear(96, 13, bias=name in ("mxfp4", "mxfp8_e5m2")), "layer")
    with torch.no_grad():
        site.weight.mul_(torch.exp(3 * torch.randn(13, 1)))
        site.weight[0] = 0
    site.put(make_weights([format_of(f) for f in candidates_of(name) or (name,)], scale, None, None))
    weight = site.effective_weight().detach()
    codes = site.weight_stages()[-1].float_codes(site.weight)
    layer = FloatLinear.of(codes, site.bias)
    assert form is None or form_of(codes) == form
    assert torch.equal(layer.weight_values(), weight), "bit for bit"
    assert layer.packed.shape == (13, 96 * codes.num_bits // 8)
    for tokens in (torch.randn(2, 5, 96), torch.randn(1, 1, 96)):
        expected = F.linear(tokens, weight, site.bias)
        torch.testing.assert_close(layer(tokens), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_levels_and_bytes_of_six_bits():
    assert element_levels(2, 1).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    for exponent_bits, mantissa_bits, dtype in ((4, 3, torch.float8_e4m3fn), (5, 2, torch.float8_e5m2)):
        numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        ours = element_levels(exponent_bits, mantissa_bits)
        assert torch.equal(ours[numbers.isfinite()], numbers[numbers.isfinite()]), "torch's codes"
    codes = torch.randint(0, 64, (3, 5, 8), dtype=torch.uint8)
    packed = pack_elements(codes, 6)
    assert packed.shape == (3, 5, 6)
    assert torch.equal(unpack_elements(packed, 6, 8), codes)
    assert packed[0, 0, 0] == (codes[0, 0, 0] | codes[0, 0, 1] << 6)
    for size in (1, 6, 7):
        packed = pack_elements(codes[..., :size], 6)
        assert packed.shape == (3, 5, 3 * -(-size // 4))
        assert torch.equal(unpack_elements(packed, 6, size), codes[..., :size])


def test_codes_of_six_bits_are_packed_where_they_are():
    with FakeTensorMode():
        packed = pack_elements(torch.empty(3, 8, dtype=torch.uint8, device="cuda"), 6)
        codes = unpack_elements(packed, 6, 8)
    assert (packed.device.type, packed.shape, codes.device.type, codes.shape) == ("cuda", (3, 6), "cuda", (3, 8))


@pytest.mark.parametrize("name", [pytest.param("mxfp4", marks=pytest.mark.slow), "nvfp4"])
def test_files_have_the_bytes_that_the_format_says(name, tmp_path):
    technique = {"type": "fp_quant", "weight_format": name, "targets": ["*_proj", "embed_tokens", "lm_head"]}
    sizes = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 4, "head_dim": 48, "vocab_size": 1024}
    checkpoint = checkpoint_of(tmp_path, "llama", [technique], **sizes)[1]
    trained = rebuild(checkpoint).model
    report = export_model(checkpoint, tmp_path / "out", packing=name)
    assert report.format == f"packed {name}"
    model = load_packed(tmp_path / "out")
    weights = {name: site.effective_weight().detach() for name, site in iter_sites(trained)}
    for path, weight in weights.items():
        assert torch.equal(model.get_submodule(path).weight_values(), weight)
    bits = 4.25 if name == "mxfp4" else 4.5
    theory = sum(weight.numel() * bits / 8 for path, weight in weights.items() if path != "lm_head")
    theory += sum(4 * parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "out/packed.safetensors").stat().st_size == pytest.approx(theory, rel=0.03)
    assert isinstance(model.model.embed_tokens, FloatEmbedding)
    assert model.lm_head.packed is model.model.embed_tokens.packed
    expected = sample_logits(trained)
    for kind, logits in sample_logits(model).items():
        torch.testing.assert_close(logits, expected[kind], rtol=1e-4, atol=1e-4)


def test_the_four_bit_format_of_powers_of_two_is_exported_too(tmp_path):
    technique = {"type": "fp_quant", "weight_format": "mxfp4", "shared_exponent": "ceil"}
    checkpoint = checkpoint_of(tmp_path, "llama", [technique], intermediate_size=64)[1]
    trained = rebuild(checkpoint).model
    export_model(checkpoint, tmp_path / "out", packing="mxfp4")
    model = load_packed(tmp_path / "out")
    for path, site in iter_sites(trained):
        assert torch.equal(model.get_submodule(path).weight_values(), site.effective_weight())


def test_a_mask_keeps_its_zeros_and_integers_stand_beside_floats(tmp_path):
    techniques = [
        {"type": "nm_sparsity", "targets": ["*_proj"]},
        {"type": "fp_quant", "weight_format": "nvfp4", "targets": ["*mlp*"]},
        {"type": "int_quant", "weight_bits": 4, "targets": ["*self_attn*"]},
    ]
    checkpoint = checkpoint_of(tmp_path, "llama", techniques)[1]
    export_model(checkpoint, tmp_path / "out", to="packed")
    model = load_packed(tmp_path / "out")
    up = model.model.layers[0].mlp.up_proj
    assert isinstance(up, FloatLinear)
    assert ((up.weight_values() != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all()
    assert model.model.layers[0].self_attn.q_proj.kind == "linear"
    with pytest.raises(ConfigError, match=r"int4 takes integers; type --to packed"):
        export_model(checkpoint, tmp_path / "int4", packing="int4")
    with pytest.raises(ConfigError, match=r"made of integers, not of nvfp4; type --to packed"):
        export_model(checkpoint, tmp_path / "nvfp4", packing="nvfp4")


def test_moved_codes_are_read_anew():
    stage = make_weights([format_of("mxfp4")], None, None, None)
    first, second = (FloatLinear.of(stage.float_codes(torch.randn(4, 32)), None) for _ in range(2))
    tokens = torch.randn(3, 32)
    assert not torch.equal(first(tokens), second(tokens))
    first.packed, first.scales = second.packed, second.scales
    assert torch.equal(first(tokens), second(tokens))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(
    "name", ["nvfp4", "e4m3", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mxfp4", "mxfp6_e2m3", "mxfp8_e4m3"))]
)
def test_transformers_reads_the_librarys_forms(name, tmp_path):
    pytest.importorskip("compressed_tensors")
    technique = {"type": "fp_quant", "weight_format": name}
    checkpoint = checkpoint_of(tmp_path, "qwen3", [technique], intermediate_size=64)[1]
    trained = rebuild(checkpoint).model
    report = export_model(checkpoint, tmp_path / "out", packing="compressed_tensors")
    assert ("moves the largest logit" in str(report)) == (name == "nvfp4")
    assert report.max_difference <= report.tolerance
    decoded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    ).eval()
    for path, site in iter_sites(trained):
        weight, found = site.effective_weight().detach(), decoded.get_submodule(path).weight
        if name == "nvfp4":
            torch.testing.assert_close(found, weight, rtol=2**-7, atol=0)
        else:
            assert torch.equal(found, weight)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    logits = plain(torch.arange(20).view(1, -1)).logits
    torch.testing.assert_close(
        logits, decoded(torch.arange(20).view(1, -1)).logits.to(logits.dtype), rtol=0.05, atol=0.1
    )


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        ({"weight_format": "mxfp8_e5m2"}, r"made of mxfp8_e5m2, and compressed-tensors has mxfp4"),
        ({"weight_format": "e8m3"}, "nothing to pack; use --to hf"),
        ({"weight_format": "mxfp4", "activation_format": "mxfp8_e4m3"}, "--activations float"),
    ],
)
def test_what_the_library_does_not_hold_is_refused(technique, message, tmp_path):
    pytest.importorskip("compressed_tensors")
    checkpoint = checkpoint_of(tmp_path, "llama", [{"type": "fp_quant", **technique}], intermediate_size=64)[1]
    with pytest.raises(ConfigError, match=message):
        export_model(checkpoint, tmp_path / "out", packing="compressed_tensors")
    assert not (tmp_path / "out").exists()


def test_a_pruned_weight_has_code_zero():
    site = LinearSite.adopt(nn.Linear(64, 4, bias=False), "layer")
    site.put(NMSparsityStage(2, 4))
    masked = site.weight_stages()[0](-site.weight.abs())
    codes = make_weights([format_of("mxfp4")], None, None, None).float_codes(masked)
    assert (codes.values[masked == 0] == 0).all(), "and not that of -0"
