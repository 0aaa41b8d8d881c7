"""Families that keep weights [in, out] learn the same with weights [out, in], and get their own layers back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import leanmill
from leanmill.core.transposed import as_linears, as_stored, transposed_weights
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.folder_weights import FolderWeights
from leanmill.models.materialise import make_materialiser
from leanmill.models.pretrained import load_weights
from tests.core.tiny import tiny


SIZES: dict[str, Any] = {"vocab_size": 61, "n_embd": 24, "n_inner": 40, "n_layer": 2, "n_head": 3, "n_positions": 32}
C_FC = "transformer.h.1.mlp.c_fc"


def gpt2(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**SIZES, **dropout, bos_token_id=None, eos_token_id=None)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def loss_of(model: Any) -> torch.Tensor:
    ids = torch.arange(40).remainder(SIZES["vocab_size"]).view(2, 20)
    return model(input_ids=ids, labels=ids).loss


def assert_is_the_same(one: Any, other: Any) -> None:
    assert {n: p.shape for n, p in one.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    assert all(torch.equal(p, other.get_parameter(n)) for n, p in one.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradients_are_those_of_the_family(dtype):
    theirs = gpt2(dtype)
    ours = as_linears(copy.deepcopy(theirs))
    turned = transposed_weights(ours)
    assert len(turned) == 8
    assert ours.get_parameter(f"{C_FC}.weight").shape == (40, 24)
    assert not [module for module in ours.modules() if isinstance(module, Conv1D)]
    loss_of(theirs).backward()
    loss_of(ours).backward()
    close = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-13}
    for name, parameter in theirs.named_parameters():
        mine = ours.get_parameter(name).grad
        torch.testing.assert_close(mine.t() if name in turned else mine, parameter.grad, **close)


def test_the_familys_own_layers_come_back_with_their_values():
    theirs = gpt2()
    ours = as_stored(as_linears(copy.deepcopy(theirs)))
    assert_is_the_same(ours, theirs)
    assert isinstance(ours.get_submodule(C_FC), Conv1D)
    assert not transposed_weights(ours)
    torch.testing.assert_close(loss_of(ours), loss_of(theirs), rtol=0, atol=0)


def test_a_family_without_such_layers_is_left_alone():
    model = tiny()
    before = {name: id(module) for name, module in model.named_modules()}
    assert not transposed_weights(as_linears(model))
    assert {name: id(module) for name, module in as_stored(model).named_modules()} == before


@pytest.mark.parametrize("names", ["of modules", "of the hub"])
def test_a_folder_is_read_turned_whole_and_in_parts(tmp_path, names):
    theirs = gpt2()
    theirs.save_pretrained(tmp_path)
    if names == "of the hub":  # no prefix, and buffers that the class has no more
        state = load_file(tmp_path / "model.safetensors")
        state = {name.removeprefix("transformer."): value for name, value in state.items()}
        save_file(state | {"h.0.attn.bias": torch.ones(1, 1, 32, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    config = ModelConfig(path=str(tmp_path))
    assert_is_the_same(as_stored(load_weights(config, dtype=None)), theirs)
    model = build_on_meta(config)
    make_materialiser(config, seed=0)(model)
    assert transposed_weights(model)
    weights = FolderWeights.open(config, downloads=False)
    assert weights is not None
    box = torch.empty(7, 5)
    weights.read_into(box, f"{C_FC}.weight", (30, 11))
    assert torch.equal(box, theirs.get_parameter(f"{C_FC}.weight").t()[30:37, 11:16])
    assert_is_the_same(as_stored(model), theirs)


def test_what_attach_has_masked_is_folded_into_the_familys_own_layers(tmp_path: Path):
    model = gpt2()
    plain = copy.deepcopy(model)
    leanmill.attach(model, [{"type": "nm_sparsity", "num_kept": 1, "group_size": 4}])
    loss_of(model).backward()
    folded = leanmill.fold(model)
    folded.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    weight, before = loaded.get_parameter(f"{C_FC}.weight"), plain.get_parameter(f"{C_FC}.weight")
    assert isinstance(loaded.get_submodule(C_FC), Conv1D)
    assert weight.shape == (24, 40)
    groups = weight.t().unflatten(-1, (-1, 4))  # along what a matmul sums over
    assert ((groups != 0).sum(-1) == 1).all()
    assert torch.equal(weight, before.where(weight != 0, 0))
    assert torch.equal(groups.abs().amax(-1), before.t().unflatten(-1, (-1, 4)).abs().amax(-1))
    torch.testing.assert_close(loss_of(loaded.eval()), loss_of(model.eval()))


def test_what_is_refused_leaves_the_model_as_it_was():
    model = gpt2()
    with pytest.raises(ValueError, match="group_size"):
        leanmill.attach(model, [{"type": "nm_sparsity", "num_kept": 1, "group_size": 5}])
    assert isinstance(model.get_submodule(C_FC), Conv1D)
