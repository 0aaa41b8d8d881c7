"""Which weights are kept in fewer bytes, what is refused, and that resume and export know it."""

import pytest
import torch

from leanmill.checkpoint.reading import read_full_state
from leanmill.core.errors import ConfigError
from leanmill.core.sites import iter_sites
from leanmill.export import export_model
from leanmill.models.frozen import compact_frozen
from leanmill.models.materialise import make_materialiser
from leanmill.recipe.root import Recipe
from leanmill.trainer.rebuild import rebuild
from tests.core.tiny import install, tiny
from tests.export.checkpoints import checkpoint_of, recipe_of


LORA = {"type": "lora", "rank": 2}


def meta(*techniques, family="llama"):
    with torch.device("meta"):
        model = tiny(family)
    install(model, *techniques)
    return model


def dtypes(model):
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def test_auto_is_bf16_where_the_run_computes_in_it():
    model = meta(LORA)
    assert compact_frozen(model, "auto", "fp32") == ""
    assert set(dtypes(model).values()) == {torch.float32}
    line = compact_frozen(model, "auto", "bf16")
    assert line.startswith("frozen weights: ")
    assert line.endswith(" in bf16")
    for name, dtype in dtypes(model).items():
        is_matrix = name.endswith("weight") and "norm" not in name
        assert dtype == (torch.bfloat16 if is_matrix else torch.float32), name


def test_what_an_adapter_may_read_stays_as_it_is():
    model = meta({"type": "peft", "method": "lora", "options": {"r": 2}})
    with pytest.raises(ConfigError, match=r"may read its weight as it is; set model.frozen_dtype=auto"):
        compact_frozen(model, "nf4", "bf16", bases_are_read=True)
    compact_frozen(model, "auto", "bf16", bases_are_read=True)
    bases = {name: dtype for name, dtype in dtypes(model).items() if "base_layer" in name}
    assert set(bases.values()) == {torch.float32}
    assert dtypes(model)["model.embed_tokens.weight"] == torch.bfloat16


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_embedding_and_head_are_kept_in_bf16(kind):
    model = meta(LORA, family="mixtral")
    compact_frozen(model, kind, "fp32")
    found = dtypes(model)
    stored = torch.int8 if kind == "int8" else torch.uint8
    assert found["model.layers.0.mlp.experts.gate_up_proj"] == stored
    assert found["model.layers.0.self_attn.q_proj.weight"] == stored
    assert found["model.embed_tokens.weight"] == torch.bfloat16
    assert all(found[name] == torch.float32 for name in found if "norm" in name or "lora" in name)


def test_what_needs_full_precision_says_so():
    with pytest.raises(ConfigError, match=r"nf4 would round .*q_proj, and lsq needs .*frozen_dtype=bf16"):
        compact_frozen(meta(LORA, {"type": "lsq"}), "nf4", "bf16")
    for kind in ("bf16", "int8"):
        with pytest.raises(ConfigError, match=f"frozen_dtype={kind}, but every .* nothing to keep in fewer bits"):
            compact_frozen(meta({"type": "ternary", "targets": ["q_proj"]}), kind, "bf16")
    with pytest.raises(ValueError, match="without techniques everything trains"):
        Recipe.model_validate(
            {"model": {"path": "m", "frozen_dtype": "nf4"}, "train": {"steps": 1}, "data": {"sequence_length": 32}}
        )


@pytest.mark.parametrize(
    "kind", ["bf16", "nf4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "int4"))]
)
def test_an_export_is_the_decoded_model_with_its_adapters(kind, tmp_path):
    model, checkpoint = checkpoint_of(tmp_path, "llama", [LORA], frozen_dtype=kind)
    report = export_model(checkpoint, tmp_path / "out")
    assert report.max_difference <= report.tolerance
    rebuilt = dict(iter_sites(rebuild(checkpoint).model))
    for name, site in iter_sites(model):
        assert torch.equal(site.folded_weight(), rebuilt[name].folded_weight()), name
    stored = read_full_state(checkpoint)
    sizes = {name: t.dtype for name, t in stored.items() if name.endswith("q_proj.weight")}
    assert set(sizes.values()) <= {torch.bfloat16, torch.int8, torch.uint8}


@pytest.mark.parametrize(("kind", "where"), [("bf16", "weight"), ("nf4", "branch")])
def test_an_adapter_is_exported_with_the_base_it_was_trained_beside(kind, where, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    lora = LORA | {"where": where}
    checkpoint = checkpoint_of(tmp_path, "llama", [lora], path=tmp_path / "base", frozen_dtype=kind)[1]
    report = export_model(checkpoint, tmp_path / "out", to="adapter")
    assert report.max_difference <= report.tolerance
    assert (tmp_path / "out/base").exists() == (kind == "nf4")


def test_a_stored_model_is_encoded_as_it_is_read(tmp_path):
    plain = tiny("llama")
    plain.save_pretrained(tmp_path / "base")
    recipe = recipe_of("llama", [LORA], path=tmp_path / "base", frozen_dtype="nf4")
    model = meta(LORA)
    compact_frozen(model, "nf4", "fp32")
    make_materialiser(recipe.model, seed=0)(model)
    weights = dict(plain.named_parameters())
    for name, site in iter_sites(model):
        stage = site.weight_stages()[0]
        if stage.kind == "nf4":
            codes, scales = stage.encode(weights[f"{name}.weight"])
            assert torch.equal(codes, site.raw_weight)
            assert torch.equal(scales, stage.scale)
