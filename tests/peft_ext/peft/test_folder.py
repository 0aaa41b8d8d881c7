"""Starting from an adapter that plain PEFT wrote: its outputs at step 0, and what does not fit is refused in a line."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType

import leanmill.peft_ext  # noqa: F401 (registers)
from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.technique import InstallContext
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.materialise import make_materialiser
from leanmill.models.pretrained import load_frozen
from leanmill.recipe.root import Recipe
from leanmill.trainer.adapter_base import check_base
from leanmill.trainer.prepare import install_techniques
from tests.export.checkpoints import recipe_of, trained_model
from tests.export.test_hf import logits
from tests.peft_ext.peft.cases import OPTIONS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    trained_model(recipe_of("qwen3", [])).save_pretrained(folder)
    return folder


def adapter_of(method: str, base: Path, folder: Path, **options: Any) -> torch.Tensor:
    """Train an adapter as PEFT alone would, save it, and return the logits beside its base."""
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.upper())]
    given = {"target_modules": ["q_proj", "v_proj"], **OPTIONS.get(method, {}), **options}
    model = get_peft_model(load_frozen(str(base)), kind(**given, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return logits(PeftModel.from_pretrained(load_frozen(str(base)), folder).eval())


def started(recipe: Recipe) -> Any:
    """The model of a run that begins."""
    model = build_on_meta(recipe.model, vocab_size=None, device_type="cpu")
    context = InstallContext(
        load_frozen_model=lambda path: torch.nn.Module(),
        vocab_size=97,
        seed=recipe.seed,
        check_base=partial(check_base, recipe.model),
    )
    techniques = install_techniques(recipe.techniques, model, context)
    make_materialiser(recipe.model, seed=recipe.seed, fill_branches=techniques.fill_branches)(model)
    return model.eval()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"r": 4, "lora_alpha": 7, "rank_pattern": {"v_proj": 2}}),
        ("mos", {}),
        ("core_lora", {"variant": "nlora"}),
        pytest.param("core_lora", {"variant": "lora_sb", "init_weights": False}, marks=pytest.mark.slow),
        pytest.param("lora", {"r": 4, "use_dora": True}, marks=pytest.mark.slow),
        pytest.param("lora", {"r": 4, "init_lora_weights": "pissa"}, marks=pytest.mark.slow),
        pytest.param("vera", {}, marks=pytest.mark.slow),
        pytest.param("oft", {}, marks=pytest.mark.slow),
        pytest.param("ia3", {"target_modules": ["k_proj", "down_proj"]}, marks=pytest.mark.slow),
        pytest.param("nola", {}, marks=pytest.mark.slow),
        pytest.param("rank_lora", {}, marks=pytest.mark.slow),
        pytest.param("psoft", {}, marks=pytest.mark.slow),
    ],
)
def test_begins_as_what_peft_saved(method: str, options: dict[str, Any], base: Path, tmp_path: Path):
    folder = tmp_path / "adapter"
    expected = adapter_of(method, base, folder, **options)
    assert (expected - logits(load_frozen(str(base)))).abs().max() > 1e-3
    recipe = recipe_of("qwen3", [{"type": "peft", "path": str(folder)}], path=base)
    technique: Any = recipe.techniques[0]
    assert technique.method == method
    torch.testing.assert_close(logits(started(recipe)), expected, rtol=1e-4, atol=1e-5)
    # What is saved with checkpoints says all of it, and is read where the folder is gone.
    shutil.rmtree(folder)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def lora_folder(base: Path, folder: Path, **changes: Any) -> Path:
    model = get_peft_model(load_frozen(str(base)), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "beside", "expected"),
    [
        ({"peft_type": "PREFIX_TUNING"}, {}, "method=prefix_tuning does not train here"),
        ({"modules_to_save": ["lm_head"]}, {}, "has modules_to_save=.*trains adapters alone"),
        ({"bias": "all"}, {}, "has bias='all'"),
        ({"use_qalora": True}, {}, "has use_qalora=True"),
        ({"target_modules": ".*q_proj"}, {}, "by a regular expression.*give peft.targets"),
        ({}, {"r": 4}, "peft.r stands beside peft.path"),
        ({}, {"options": {"r": 4}}, "peft.options stands beside peft.path"),
    ],
)
def test_what_is_refused_when_the_recipe_is_read(
    changes: dict[str, Any], beside: dict[str, Any], expected: str, base: Path, tmp_path: Path
):
    folder = lora_folder(base, tmp_path / "adapter", **changes)
    with pytest.raises(pydantic.ValidationError, match=expected):
        parse_technique({"type": "peft", "path": str(folder), **beside})


def test_what_is_no_adapter(tmp_path: Path):
    with pytest.raises(pydantic.ValidationError, match=r"has no adapter_config.json; name a folder that PEFT or"):
        parse_technique({"type": "peft", "path": str(tmp_path)})
    for text, expected in (("{", "cannot be read"), ("[]", "no table of options")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(pydantic.ValidationError, match=expected):
            parse_technique({"type": "peft", "path": str(tmp_path)})


@pytest.mark.parametrize(
    ("technique", "damage", "expected"),
    [
        ({"method": "vera"}, "", "method=vera, and peft.path=.* is of method lora; leave it out"),
        ({"method": "lora", "r": 2, "lora_alpha": 3}, "", r"peft.lora_alpha=3, and the adapter in .* has 8; leave it"),
        ({"targets": ["q_proj", "v_proj"]}, "", "has no values for .*v_proj.*give the peft.targets"),
        ({"targets": ["v_proj"]}, "", "has no values for .*give the peft.targets"),
        ({}, "cut", "does not fit this model.*set model.path"),
        ({}, "shape", "does not fit this model: .*size mismatch.*set model.path"),
    ],
)
def test_what_does_not_fit_the_model(technique: dict[str, Any], damage: str, expected: str, base: Path, tmp_path: Path):
    folder = lora_folder(base, tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-7])
    if damage == "shape":
        from safetensors.torch import load_file, save_file

        save_file({name: value[:, :-1].contiguous() for name, value in load_file(weights).items()}, weights)
    recipe = recipe_of("qwen3", [{"type": "peft", "path": str(folder), **technique}], path=base)
    with pytest.raises(ConfigError, match=expected) as error:
        started(recipe)
    assert "\n" not in str(error.value)


def test_another_base_is_refused(base: Path, tmp_path: Path):
    check_base(ModelConfig(path=str(base)), str(base) + "/", "peft.path=x")
    same = tmp_path / "same"
    shutil.copytree(base, same)
    check_base(ModelConfig(path=str(same)), str(base), "peft.path=x")
    other = tmp_path / "other"
    trained_model(recipe_of("qwen3", [], num_hidden_layers=1)).save_pretrained(other)
    for model, named, expected in (
        (ModelConfig(path=str(other)), str(base), r"x belongs to .*, whose weights are not those of .*; set"),
        (ModelConfig(path=str(other)), "nobody/gone", r"nobody/gone, which is not on this machine.*set model.path="),
        (recipe_of("qwen3", []).model, str(base), r"begins with random weights; set model.path="),
    ):
        with pytest.raises(ConfigError, match=expected):
            check_base(model, named, "peft.path=x")
    recipe = recipe_of("qwen3", [{"type": "peft", "path": str(lora_folder(base, tmp_path / "a"))}], path=other)
    with pytest.raises(ConfigError, match="are not those of model.path"):
        started(recipe)
