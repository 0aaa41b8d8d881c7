"""A PEFT folder loaded on the base computes what the trained model computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from leanmill.checkpoint.fingerprint import fingerprint_folder
from leanmill.checkpoint.manager import CheckpointManager
from leanmill.core.errors import ConfigError
from leanmill.export import export_model
from leanmill.models.pretrained import load_frozen
from tests.export.checkpoints import HeldModel, checkpoint_of, recipe_of, trained_model
from tests.export.test_hf import BRANCH, LORA, SPARSE, TERNARY, logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = trained_model(recipe_of("qwen3", []))
    model.save_pretrained(tmp_path / "given")
    return tmp_path / "given"


@pytest.mark.parametrize(
    "technique", [LORA, BRANCH, {**LORA, "use_rslora": True}, {**LORA, "targets": ["layers.1.*_proj", "embed_tokens"]}]
)
def test_adapter_on_a_given_base(technique: dict, base: Path, tmp_path: Path) -> None:
    model, checkpoint = checkpoint_of(tmp_path / "run", "qwen3", [technique], path=base)
    report = export_model(checkpoint, tmp_path / "out", to="adapter")
    names = {path.name for path in report.path.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "leanmill.json"}
    config = json.loads((report.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    reloaded = PeftModel.from_pretrained(load_frozen(str(base)), str(report.path)).eval()
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-5)
    assert (logits(reloaded) - logits(load_frozen(str(base)))).abs().max() > 1e-2
    assert report.num_parameters == sum(
        t.numel() for t in load_file(report.path / "adapter_model.safetensors").values()
    )


@pytest.mark.parametrize(
    "technique", [LORA, {**LORA, "targets": ["experts.*"]}, {**LORA, "targets": ["experts.down_proj", "q_proj"]}]
)
def test_adapters_of_stacked_experts(technique: dict, tmp_path: Path) -> None:
    given = tmp_path / "given"
    trained_model(recipe_of("mixtral", [])).save_pretrained(given)
    model, checkpoint = checkpoint_of(tmp_path / "run", "mixtral", [technique], path=given)
    report = export_model(checkpoint, tmp_path / "out", to="adapter")
    config = json.loads((report.path / "adapter_config.json").read_text())
    assert all(name.rpartition(".")[0].endswith("experts") for name in config["target_parameters"])
    assert config["target_parameters"]
    reloaded = PeftModel.from_pretrained(load_frozen(str(given)), str(report.path)).eval()
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-5)
    assert (logits(reloaded) - logits(load_frozen(str(given)))).abs().max() > 1e-2


def test_merging_either_way_gives_one_model(base: Path, tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of(tmp_path / "run", "qwen3", [BRANCH], path=base)
    adapter = export_model(checkpoint, tmp_path / "adapter", to="adapter")
    merged = export_model(checkpoint, tmp_path / "merged")
    by_peft = PeftModel.from_pretrained(load_frozen(str(base)), str(adapter.path)).merge_and_unload()
    torch.testing.assert_close(logits(by_peft), logits(load_frozen(str(merged.path))), rtol=1e-4, atol=1e-5)


def test_an_export_shows_no_warning_of_a_library(base: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    _, checkpoint = checkpoint_of(tmp_path / "run", "qwen3", [BRANCH], path=base)
    recwarn.clear()
    export_model(checkpoint, tmp_path / "out", to="adapter")
    assert [str(warning.message) for warning in recwarn] == []


def test_targets_are_short_where_that_says_the_same(base: Path, tmp_path: Path) -> None:
    found = []
    for index, targets in enumerate((["q_proj", "mlp.*"], ["layers.1.self_attn.q_proj"])):
        _, checkpoint = checkpoint_of(tmp_path / f"run{index}", "qwen3", [{**LORA, "targets": targets}], path=base)
        export_model(checkpoint, tmp_path / f"out{index}", to="adapter")
        config = json.loads((tmp_path / f"out{index}" / "adapter_config.json").read_text())
        found.append(sorted(config["target_modules"]))
    assert found == [["down_proj", "gate_proj", "q_proj", "up_proj"], ["model.layers.1.self_attn.q_proj"]]


@pytest.mark.parametrize("techniques", [[BRANCH], [BRANCH, SPARSE, TERNARY]])
def test_the_folded_base_is_written_where_there_is_no_other(techniques: list[dict], tmp_path: Path) -> None:
    model, checkpoint = checkpoint_of(tmp_path / "run", "qwen3", techniques)
    report = export_model(checkpoint, tmp_path / "out", to="adapter")
    reloaded = AutoPeftModelForCausalLM.from_pretrained(str(report.path)).eval()
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-5)
    plain = load_frozen(str(report.path / "base"))
    weight = plain.model.layers[0].mlp.up_proj.weight
    if len(techniques) > 1:
        assert int((weight.unflatten(-1, (-1, 4)) != 0).sum(-1).max()) <= 2


def test_a_checkpoint_of_the_adapter_alone(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of("qwen3", [LORA], path=base)
    model = trained_model(recipe)
    manager = CheckpointManager(tmp_path / "run", recipe.checkpoint)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    held, document = HeldModel(model), recipe.model_dump(mode="json")
    manager.save(3, held, {"step": 3}, document, names=trained, base=fingerprint_folder(base))  # type: ignore[arg-type]
    report = export_model(manager.latest(), tmp_path / "out", to="adapter")
    reloaded = PeftModel.from_pretrained(load_frozen(str(base)), str(report.path)).eval()
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-5)
    other = load_file(base / "model.safetensors")
    other["model.norm.weight"] = other["model.norm.weight"] * 2
    (base / "model.safetensors").unlink()
    save_file(other, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="adapters were trained on"):
        export_model(manager.latest(), tmp_path / "other", to="adapter")


@pytest.mark.parametrize(
    ("family", "techniques", "expected"),
    [
        ("llama", [], "holds no adapter"),
        ("llama", [SPARSE], "holds no adapter"),
        ("llama", [LORA, TERNARY], "where: branch"),
    ],
)
def test_what_peft_cannot_hold(family: str, techniques: list[dict], expected: str, tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of(tmp_path / "run", family, techniques)
    with pytest.raises(ConfigError, match=expected):
        export_model(checkpoint, tmp_path / "out", to="adapter")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_branch_is_a_peft_layer_before_and_a_linear_after(tmp_path: Path) -> None:
    from leanmill.core.branches import branched_layers
    from leanmill.export.folding import fold

    model = trained_model(recipe_of("qwen3", [BRANCH]))
    assert len(list(branched_layers(model))) == 14
    before = logits(model)
    fold(model)
    assert not list(branched_layers(model))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_two_deltas_of_one_weight_are_one_adapter(base: Path, tmp_path: Path) -> None:
    second = {**LORA, "rank": 2, "alpha": 1, "targets": ["q_proj"]}
    model, checkpoint = checkpoint_of(tmp_path / "run", "qwen3", [LORA, second], path=base)
    report = export_model(checkpoint, tmp_path / "out", to="adapter")
    assert report.max_difference <= report.tolerance
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {LORA["rank"], LORA["rank"] + 2}
