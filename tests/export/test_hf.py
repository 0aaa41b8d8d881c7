"""A folder that plain transformers loads computes what the trained model computes."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.sites import iter_sites
from leanmill.export import bitnet, export_model
from leanmill.export.bitnet import pack, quantise_input
from tests.export.checkpoints import checkpoint_of
from tests.models.families import FAMILIES, tiny_config


SPARSE = {"type": "nm_sparsity"}
TERNARY = {"type": "ternary"}
LAYERS = [{"type": "layernorm_scaling"}, {"type": "stochastic_depth", "early_exit": {}}, {"type": "ternary"}]
LORA = {"type": "lora", "rank": 3, "alpha": 6}
BRANCH = {**LORA, "where": "branch"}


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(34).view(2, 17) * 5 % 97
    positions = torch.cat([torch.arange(8), torch.arange(9)]).expand(2, -1)
    with torch.no_grad():
        # With a cache, transformers does not look for restarting positions.
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits


def plain(path: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(str(path), dtype="auto").eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_mask_and_ternary(family: str, tmp_path: Path) -> None:
    # DeepSeek's q_a_proj and friends have 16 or 24 columns, the rest 32 or 48: all multiples of 4.
    model, checkpoint = checkpoint_of(tmp_path / "run", family, [SPARSE, TERNARY])
    report = export_model(checkpoint, tmp_path / "out")
    reloaded = plain(report.path)
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-5)
    assert report.max_difference <= report.tolerance
    assert type(reloaded.get_submodule("model.layers.1.self_attn.o_proj")) is nn.Linear
    for name, site in iter_sites(model):
        weight = reloaded.get_parameter(site.weight_name).detach()
        assert torch.equal(weight, site.effective_weight().detach()), name
        assert int((weight.unflatten(-1, (-1, 4)) != 0).sum(-1).max()) <= 2
        levels = weight.flatten(-2).abs().sort(-1).values[..., -1:]
        assert torch.all((weight.flatten(-2).abs() == levels) | (weight.flatten(-2) == 0)), name
    assert len(report.sparsity) == len(list(iter_sites(model)))
    assert min(report.sparsity.values()) >= 0.5


def test_a_family_of_our_own_can_bring_its_code(tmp_path: Path, modules_cache: Path) -> None:
    model, checkpoint = checkpoint_of(tmp_path / "run", "pr_moe", [SPARSE])
    assert "import leanmill.models.pr_moe.register" in str(export_model(checkpoint, tmp_path / "out"))
    report = export_model(checkpoint, tmp_path / "code", to="hf_code")
    assert "trust_remote_code=True" in str(report)
    settings = json.loads((report.path / "config.json").read_text())
    assert settings["auto_map"]["AutoModelForCausalLM"] == "modeling_pr_moe.PrMoeForCausalLM"
    code = {path.name: path.read_text() for path in report.path.glob("*.py")}
    assert sorted(code) == ["__init__.py", "configuration_pr_moe.py", "modeling_pr_moe.py"][-len(code) :]
    assert not any("import leanmill" in text or "from leanmill" in text for text in code.values())
    torch.testing.assert_close(logits(plain(report.path)), logits(model), rtol=1e-4, atol=1e-5)
    # What is saved later brings no code again.
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    _, other = checkpoint_of(tmp_path / "other", "llama", [])
    with pytest.raises(ConfigError, match="llama built in .* --to hf$"):
        export_model(other, tmp_path / "not", to="hf_code")


@pytest.mark.parametrize(
    "techniques",
    [[], [SPARSE], [TERNARY], [LORA], [BRANCH], [LORA, SPARSE, TERNARY], [{**TERNARY, "granularity": "row"}], LAYERS],
    ids=["none", "sparse", "ternary", "lora", "branch", "all", "rows", "layers"],
)
def test_every_technique(techniques: list[dict], tmp_path: Path) -> None:
    model, checkpoint = checkpoint_of(tmp_path / "run", "qwen3", techniques)
    report = export_model(checkpoint, tmp_path / "out")
    torch.testing.assert_close(logits(plain(report.path)), logits(model), rtol=1e-4, atol=1e-5)
    summary = json.loads((report.path / "leanmill.json").read_text())
    assert [t["type"] for t in summary["techniques"]] == [t["type"] for t in techniques]
    assert json.loads((report.path / "config.json").read_text())["use_cache"] is True
    assert {p.suffix for p in report.path.iterdir()} <= {".json", ".safetensors"}
    assert "largest logit difference" in str(report)


@pytest.mark.parametrize("technique", [TERNARY, {"type": "lsq", "granularity": "row"}], ids=["ternary", "lsq"])
def test_tied_weights_stay_tied(technique: dict, tmp_path: Path) -> None:
    technique = {**technique, "targets": ["*_proj", "embed_tokens", "lm_head"]}
    model, checkpoint = checkpoint_of(tmp_path / "run", "llama", [technique])
    report = export_model(checkpoint, tmp_path / "out")
    reloaded = plain(report.path)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-5)


def test_a_learned_mask_leaves_the_weights_as_they_were(tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_config("qwen3")))
    dense.save_pretrained(tmp_path / "dense")
    model, checkpoint = checkpoint_of(tmp_path / "run", "qwen3", [{"type": "mask_llm"}], path=tmp_path / "dense")
    report = export_model(checkpoint, tmp_path / "out")
    reloaded = plain(report.path)
    for name, parameter in plain(tmp_path / "dense").named_parameters():
        exported = reloaded.get_parameter(name)
        if "_proj" not in name:
            assert torch.equal(exported, parameter), name
            continue
        kept = exported != 0
        assert (kept.reshape(-1, 4).sum(-1) == 2).all(), name
        assert torch.equal(exported[kept], parameter[kept]), name
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-5)


def test_a_branch_beside_a_mask_is_not_merged(tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of(tmp_path / "run", "llama", [SPARSE, BRANCH])
    with pytest.raises(ConfigError, match="--to adapter"):
        export_model(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bitnet_packing_loads_and_matches_on_8_bit_inputs(tmp_path: Path) -> None:
    model, checkpoint = checkpoint_of(tmp_path / "run", "qwen3", [{**TERNARY, "exclude": ["layers.0.mlp.down_proj"]}])
    report = export_model(checkpoint, tmp_path / "out", to="bitnet")
    config = json.loads((report.path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitnet"
    assert "lm_head" in config["modules_to_not_convert"]
    with torch.compiler.set_stance("force_eager"):
        reloaded = plain(report.path)
        found = logits(reloaded)
    packed = reloaded.model.layers[1].mlp.up_proj
    assert packed.weight.dtype == torch.uint8
    assert packed.weight.shape == (12, 32)
    assert type(reloaded.model.layers[0].mlp.down_proj) is nn.Linear
    # The same maths written out: inputs of the ternary layers rounded to 8 bits.
    for site in [site for _, site in iter_sites(model)]:
        site.register_forward_pre_hook(lambda _, inputs: (quantise_input(inputs[0]),))
    torch.testing.assert_close(found, logits(model), rtol=1e-3, atol=1e-3)
    assert report.max_difference <= report.tolerance
    assert report.tolerance == pytest.approx(1e-4 * max(1, found.abs().max().item()), rel=0.5)
    assert "on 8-bit inputs" in str(report)
    assert "of sampled tokens keep their top logit" in str(report)
    whole = export_model(checkpoint, tmp_path / "whole")
    assert (report.path / "model.safetensors").stat().st_size < (whole.path / "model.safetensors").stat().st_size / 2


@pytest.mark.parametrize("damage", ["scale", "code", "norm"])
def test_a_bitnet_export_that_computes_something_else_is_refused(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, checkpoint = checkpoint_of(tmp_path / "run", "llama", [TERNARY])
    save = bitnet._save

    def damaged(
        model: nn.Module, ternary: dict[str, tuple[torch.Tensor, float]], folder: Path, norm_eps: float | None
    ) -> None:
        name = "model.layers.1.self_attn.v_proj"
        weight, scale = ternary[name]
        if damage == "scale":
            ternary = ternary | {name: (weight, 1.002 * scale)}
        elif damage == "code":
            weight = weight.clone()
            weight[0, 0] = 1 if weight[0, 0] < 1 else 0
            ternary = ternary | {name: (weight, scale)}
        norm = model.get_parameter("model.layers.1.input_layernorm.weight")
        with torch.no_grad():
            norm *= 1.05 if damage == "norm" else 1
            save(model, ternary, folder, norm_eps)
            norm /= 1.05 if damage == "norm" else 1

    monkeypatch.setattr(bitnet, "_save", damaged)
    with pytest.raises(RunError, match="the reloaded BitNet export"):
        export_model(checkpoint, tmp_path / "out", to="bitnet")
    assert not (tmp_path / "out").exists()


def test_packing_is_that_of_transformers() -> None:
    from transformers.integrations.bitnet import pack_weights

    ternary = torch.randint(-1, 2, (12, 7), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(pack(ternary), pack_weights(ternary.clone()))


@pytest.mark.parametrize(
    ("family", "techniques", "expected"),
    [
        ("llama", [{**TERNARY, "granularity": "row"}], "granularity: tensor"),
        ("llama", [SPARSE], "nothing to pack"),
        ("deepseek_v3", [{**TERNARY, "targets": ["mlp.experts.gate_up_proj"]}], "nothing to pack"),
    ],
)
def test_what_the_bitnet_format_cannot_hold(family: str, techniques: list[dict], expected: str, tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of(tmp_path / "run", family, techniques)
    with pytest.raises(ConfigError, match=expected):
        export_model(checkpoint, tmp_path / "out", to="bitnet")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_damaged_checkpoint_and_a_taken_folder_are_refused(tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of(tmp_path / "run", "llama", [])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="exists already"):
        export_model(checkpoint, tmp_path / "out")
    weights = next((checkpoint / "model").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RunError, match="incomplete or damaged: .*name another checkpoint"):
        export_model(checkpoint, tmp_path / "new")
    with pytest.raises(ConfigError, match="no such folder"):
        export_model(tmp_path / "nothing", tmp_path / "new")


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    from leanmill.trainer.rebuild import _load

    model, _ = checkpoint_of(tmp_path / "run", "llama", [])
    state = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=r"lacks model\.norm\.weight"):
        _load(model, {k: v for k, v in state.items() if k != "model.norm.weight"}, tmp_path, False)
    with pytest.raises(ConfigError, match="holds other"):
        _load(model, state | {"other": torch.zeros(1)}, tmp_path, False)
    with pytest.raises(ConfigError, match="shape"):
        _load(model, state | {"model.norm.weight": torch.zeros(3)}, tmp_path, False)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    _, checkpoint = checkpoint_of(tmp_path / "run", "llama", [])

    def fail(self: object, folder: Path, **_: object) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(RunError, match="disk is full"):
        export_model(checkpoint, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_copy_that_differs_is_not_a_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leanmill.export import hf

    _, checkpoint = checkpoint_of(tmp_path / "run", "llama", [SPARSE])
    reload = hf.reload

    def tampered(folder: Path, task: str) -> nn.Module:
        model = reload(folder, task)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        return model

    monkeypatch.setattr(hf, "reload", tampered)
    with pytest.raises(RunError, match="other logits"):
        export_model(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


QUEST = {"type": "quest", "weight_bits": 4, "activation_bits": None}


@pytest.mark.parametrize(
    "technique", [QUEST, {"type": "lsq"}, {"type": "int_quant"}, {"type": "bdwp", "group_size": 4}]
)
def test_stages_of_every_kind_fold(technique: dict, tmp_path: Path) -> None:
    model, checkpoint = checkpoint_of(tmp_path / "run", "qwen3", [technique])
    report = export_model(checkpoint, tmp_path / "out")
    torch.testing.assert_close(logits(plain(report.path)), logits(model), rtol=1e-4, atol=1e-5)


def test_rounded_activations_are_not_dropped_unasked(tmp_path: Path) -> None:
    model, checkpoint = checkpoint_of(tmp_path / "run", "qwen3", [{**QUEST, "activation_bits": 4}])
    with pytest.raises(ConfigError, match=r"quest on 14 weights.*--activations float"):
        export_model(checkpoint, tmp_path / "out")
    report = export_model(checkpoint, tmp_path / "out", activations="float")
    assert "float activations, as asked" in str(report)
    for _, site in iter_sites(model):
        site.put_input(site.inputs.pop("quant").unrounded())
    torch.testing.assert_close(logits(plain(report.path)), logits(model), rtol=1e-4, atol=1e-5)


def test_bitnet_packing_repeats_the_inputs_of_training(tmp_path: Path) -> None:
    model, checkpoint = checkpoint_of(tmp_path / "run", "qwen3", [{**TERNARY, "activation_bits": 8}])
    with pytest.raises(ConfigError, match=r"--to bitnet or packed.*or --activations float"):
        export_model(checkpoint, tmp_path / "none")
    report = export_model(checkpoint, tmp_path / "out", to="bitnet")
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(logits(plain(report.path)), logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["ternary", "binary"])
def test_bitnet_packing_repeats_the_norm_inside_of_layers(kind: str, tmp_path: Path) -> None:
    whole = {"type": kind, "activation_bits": 8, "input_norm": True}
    model, checkpoint = checkpoint_of(tmp_path / "run", "qwen3", [whole])
    with pytest.raises(ConfigError, match=r"cannot do without; type --to bitnet"):
        export_model(checkpoint, tmp_path / "none", activations="float")
    report = export_model(checkpoint, tmp_path / "out", to="bitnet")
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(logits(plain(report.path)), logits(model), rtol=1e-3, atol=1e-3)


def test_a_norm_inside_of_some_layers_only_is_refused(tmp_path: Path) -> None:
    parts = [{"type": "binary", "targets": ["q_proj"]}, {**TERNARY, "input_norm": True, "targets": ["k_proj"]}]
    _, checkpoint = checkpoint_of(tmp_path / "run", "qwen3", parts)
    with pytest.raises(ConfigError, match=r"train all with the same input_norm"):
        export_model(checkpoint, tmp_path / "out", to="bitnet")


@pytest.mark.parametrize("to", ["hf", "adapter"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_branches_over_a_frozen_base_in_bf16(is_tied: bool, to: str, tmp_path: Path) -> None:
    base, _ = checkpoint_of(tmp_path / "first", "llama", [], tie_word_embeddings=is_tied)
    base.save_pretrained(tmp_path / "base")
    model, checkpoint = checkpoint_of(tmp_path / "run", "llama", [BRANCH], path=tmp_path / "base", precision="bf16")
    assert any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    report = export_model(checkpoint, tmp_path / "out", to=to)
    if to == "hf":
        torch.testing.assert_close(logits(plain(report.path)), logits(model.float()), rtol=1e-4, atol=1e-5)
        assert {parameter.dtype for parameter in plain(report.path).parameters()} == {torch.float32}
