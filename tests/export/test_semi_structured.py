"""2:4 weights as values and metadata of torch's semi-structured tensors."""

import copy
import pickle

import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from leanmill.core.errors import ConfigError
from leanmill.core.sites import iter_sites
from leanmill.export import export_model, load_packed
from leanmill.export.compare import sample_logits
from leanmill.export.sparse_layer import SparseLinear
from leanmill.trainer.rebuild import rebuild
from tests.export.checkpoints import checkpoint_of


SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32}


@pytest.mark.parametrize(
    "technique", [{"type": "nm_sparsity"}, {"type": "nm_sparsity", "num_kept": 1}, {"type": "mask_llm"}]
)
def test_a_folder_holds_the_trained_weights_in_bf16(technique, tmp_path):
    checkpoint = checkpoint_of(tmp_path, "llama", [technique], **SIZES)[1]
    trained = rebuild(checkpoint).model
    staged = {name: site.effective_weight().detach().bfloat16() for name, site in iter_sites(trained)}
    report = export_model(checkpoint, tmp_path / "out", packing="2_4")
    assert report.format == "2:4"
    model = load_packed(tmp_path / "out")
    for name, weight in staged.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, SparseLinear)
        assert torch.equal(layer.weight_values(), weight.float())
        # What torch's own conversion makes of the dense weight, byte for byte.
        values, meta = sparse_semi_structured_from_dense_cutlass(weight)
        assert torch.equal(layer.values, values)
        assert torch.equal(layer.meta, meta)
        assert layer.stored_bytes == 0.5625 * 2 * weight.numel()
        tensor = layer.weight_tensor()
        assert tensor.shape == weight.shape
        assert tensor.packed is layer.values
    plain = sum(4 * parameter.numel() for name, parameter in model.named_parameters())
    theory = plain + sum(1.125 * weight.numel() for weight in staged.values())
    assert (tmp_path / "out/packed.safetensors").stat().st_size == pytest.approx(theory, rel=0.03)
    for kind, logits in sample_logits(model).items():
        torch.testing.assert_close(logits, sample_logits(trained)[kind], rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        (
            {"type": "nm_sparsity"},
            r"is \[32, 32\], and torch's 2:4 tensors have rows in multiples of 32, columns in mul",
        ),
        ({"type": "nm_sparsity", "group_size": 8}, "no linear weight of this run keeps 2 of every 4"),
        ({"type": "ternary"}, "no linear weight of this run keeps 2 of every 4"),
    ],
)
def test_what_has_no_such_form_is_refused(technique, message, tmp_path):
    checkpoint = checkpoint_of(tmp_path, "llama", [technique])[1]
    with pytest.raises(ConfigError, match=message):
        export_model(checkpoint, tmp_path / "out", packing="2_4")
    assert not (tmp_path / "out").exists()


def sparse_layer(seed, bias=None):
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)) * torch.tensor([1.0, 0, 0, 1]).repeat(
        16
    )
    return SparseLinear.of(weight, bias)


def test_the_dense_weight_follows_what_is_stored():
    layer, other, tokens = sparse_layer(0), sparse_layer(1), torch.randn(3, 64)
    before = layer(tokens)
    layer.load_state_dict(other.state_dict())
    assert not torch.equal(layer(tokens), before)
    assert torch.equal(layer(tokens), other(tokens))
    layer.values = sparse_layer(0).values
    assert torch.equal(layer(tokens), before)
    assert torch.equal(layer(tokens.bfloat16()), tokens.bfloat16() @ layer.weight_values().bfloat16().T)


def test_a_copy_carries_no_dense_weight():
    layer, tokens = sparse_layer(0, torch.randn(32)), torch.randn(3, 64)
    empty = len(pickle.dumps(layer))
    expected = layer(tokens)
    assert len(pickle.dumps(layer)) == empty
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(tokens), expected)
