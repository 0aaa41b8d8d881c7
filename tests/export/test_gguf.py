"""GGUF files of ternary models, read back by the gguf package and by transformers."""

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.core.sites import iter_sites
from leanmill.export import export_model, gguf
from leanmill.trainer.rebuild import rebuild
from tests.export.checkpoints import checkpoint_of


SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
BYTES = {"gguf": 54 / 256, "gguf_tq2_0": 66 / 256}


@pytest.mark.parametrize(("family", "packing"), [("llama", "gguf"), ("llama", "gguf_tq2_0"), ("qwen3", "gguf")])
def test_codes_come_back_bit_for_bit(family, packing, tmp_path):
    package = pytest.importorskip("gguf")
    technique = {"type": "ternary", "granularity": "row"}
    head = {"head_dim": 64} if family == "qwen3" else {}
    checkpoint = checkpoint_of(tmp_path, family, [technique], **SIZES, **head)[1]
    trained = rebuild(checkpoint).model
    report = export_model(checkpoint, tmp_path / "out", packing=packing)
    assert report.max_difference <= report.tolerance
    reader = package.GGUFReader(str(tmp_path / "out" / gguf.FILE))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    tensor = stored["blk.1.ffn_down.weight"]
    found = torch.from_numpy(package.dequantize(tensor.data, tensor.tensor_type))
    weight = dict(iter_sites(trained))["model.layers.1.mlp.down_proj"].effective_weight()
    assert torch.equal(found.sign(), weight.sign())
    torch.testing.assert_close(found, weight.detach(), rtol=2**-11, atol=0)
    num_ternary = sum(site.raw_weight.numel() for _, site in iter_sites(trained))
    num_plain = sum(parameter.numel() for parameter in trained.parameters()) - num_ternary
    theory = num_ternary * BYTES[packing] + 4 * num_plain
    assert (tmp_path / "out" / gguf.FILE).stat().st_size == pytest.approx(theory, rel=0.03)


@pytest.mark.parametrize(
    ("family", "technique", "changes", "message"),
    [
        ("llama", {"type": "ternary"}, {}, "has 32 columns, and GGUF's ternary types share a scale among 256"),
        (
            "llama",
            {"type": "int_quant", "weight_bits": 4},
            SIZES,
            r"is ternary \(ternary, int_quant and symmetric lsq with 2 bits",
        ),
        ("mixtral", {"type": "ternary"}, {}, "GGUF is written for llama, qwen2, qwen3, not mixtral"),
        ("llama", {"type": "ternary"}, {**SIZES, "attention_bias": True}, "biases of attention"),
    ],
)
def test_what_a_file_does_not_hold_is_refused(family, technique, changes, message, tmp_path):
    pytest.importorskip("gguf")
    checkpoint = checkpoint_of(tmp_path, family, [technique], **changes)[1]
    with pytest.raises(ConfigError, match=message):
        export_model(checkpoint, tmp_path / "out", packing="gguf")
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = gguf.GgufFormat.covers(None)
    assert "pip install 'leanmill[formats]'" in str(reason)
