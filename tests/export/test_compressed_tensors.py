"""compressed-tensors folders: the library's own packing, word for word, and plain transformers reads them."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from leanmill.core.errors import ConfigError
from leanmill.core.facets import Codes
from leanmill.core.sites import iter_sites
from leanmill.export import compressed_tensors, export_model
from leanmill.export.compare import sample_logits
from leanmill.export.compressed_tensors import Words, bits_of
from leanmill.trainer.rebuild import rebuild
from tests.export.checkpoints import checkpoint_of


CASES = {
    "ternary": ({"type": "ternary"}, 2),
    "int4 groups": ({"type": "int_quant", "weight_bits": 4, "granularity": "group", "group_size": 16}, 4),
    "int3": ({"type": "int_quant", "weight_bits": 3}, 4),
    "lsq 4 bits": ({"type": "lsq", "weight_bits": 4, "granularity": "row"}, 4),
    "int8": ({"type": "int_quant", "weight_bits": 8}, 8),
}


@pytest.mark.parametrize("name", CASES)
def test_plain_transformers_computes_what_was_trained(name, tmp_path):
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    assert library is not None
    technique, bits = CASES[name]
    checkpoint = checkpoint_of(tmp_path, "qwen3", [technique])[1]
    trained = rebuild(checkpoint).model
    report = export_model(checkpoint, tmp_path / "out", packing="compressed_tensors")
    assert report.max_difference <= report.tolerance
    stored = load_file(tmp_path / "out/model.safetensors")
    for path, site in iter_sites(trained):
        codes = site.weight_stages()[-1].codes(site.raw_weight)
        signed = codes.values.to(torch.int16) - int(codes.zero)
        assert torch.equal(stored[f"{path}.weight_packed"], pack_to_int32(signed.to(torch.int8), bits))
        assert stored[f"{path}.weight_shape"].tolist() == list(site.raw_weight.shape)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected = sample_logits(trained)
    for kind, logits in sample_logits(model).items():
        torch.testing.assert_close(logits, expected[kind], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("encoding", "zero", "bits"), [(4, 8.0, 4), (4, 7.0, 4), (2, 2.0, 2), ("ternary", 0.0, 2), (8, 128.0, 8)]
)
def test_words_have_the_first_code_in_their_lowest_bits(encoding, zero, bits):
    lowest, largest = (-1, 1) if encoding == "ternary" else (0, 2**encoding - 1)
    last = largest if zero * 2 > largest else largest - 1
    values = torch.randint(lowest, last + 1, (3, 21))
    dtype = torch.int8 if encoding == "ternary" else torch.uint8
    codes = Codes(values=values.to(dtype), encoding=encoding, scales=torch.rand(3, 1), zero=zero)
    assert bits_of(codes) == bits
    words = Words(codes, bits).packed.long() & 0xFFFFFFFF
    assert words.shape == (3, -(-21 * bits // 32))
    per_word = 32 // bits
    for column in range(21):
        found = (words[:, column // per_word] >> (column % per_word * bits)) & ((1 << bits) - 1)
        assert torch.equal(found, values[:, column] - int(zero) + (1 << (bits - 1)))


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        (
            {"type": "lsq", "weight_bits": 2, "grid": "midrise"},
            r"around 1.5, and compressed-tensors has only grids with a",
        ),
        ({"type": "nm_sparsity"}, "nothing to pack; use --to hf"),
        ({"type": "int_quant", "weight_bits": 4, "activation_bits": 8}, "--activations float"),
    ],
)
def test_what_the_format_does_not_hold_is_refused(technique, message, tmp_path, monkeypatch):
    monkeypatch.setattr(compressed_tensors.importlib.util, "find_spec", lambda name: object())
    checkpoint = checkpoint_of(tmp_path, "llama", [technique])[1]
    with pytest.raises(ConfigError, match=message):
        export_model(checkpoint, tmp_path / "out", packing="compressed_tensors")
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(compressed_tensors.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'leanmill[formats]'" in str(compressed_tensors.CompressedTensorsFormat.covers(None))
