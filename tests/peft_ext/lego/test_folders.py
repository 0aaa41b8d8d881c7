"""Merging adapter folders: PEFT loads what is written, and what cannot be merged is refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from leanmill.cli.main import main
from leanmill.core.errors import ConfigError
from leanmill.peft_ext.lego.folders import merge_adapters
from leanmill.peft_ext.lego.units import Factors, merge_factors


def base() -> Any:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 5, bias=False))
    model.config = {"model_type": "custom"}  # type: ignore[assignment]
    return model


def adapter(folder: Path, seed: int, **options: Any) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["0", "1"], **options}, init_lora_weights=False)
    get_peft_model(base(), config).save_pretrained(folder)
    return folder


def factors_of(folder: Path, layer: str, scaling: float) -> Factors:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = f"base_model.model.{layer}"
    return Factors(tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"], scaling)


def test_peft_loads_the_merged_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Ranks and strengths by layer, a layer that one of the two leaves alone, and rank-stabilised scaling."""
    one = adapter(tmp_path / "one", 1, rank_pattern={"1": 2}, alpha_pattern={"1": 5})
    two = adapter(tmp_path / "two", 2, r=4, target_modules=["1"], use_rslora=True)
    out = tmp_path / "merged"
    assert main(["merge", str(one), str(two), "--out", str(out), "--rank", "3", "--seed", "4"]) == 0
    assert "2 layers, 9 ranks merged into 6" in capsys.readouterr().out
    first = merge_factors([factors_of(one, "0", 2.0)], 3, seed=4)
    second = merge_factors([factors_of(one, "1", 2.5), factors_of(two, "1", 3.0)], 3, seed=4)
    x = torch.randn(4, 6)
    deltas = [f.scaling * f.b @ f.a for f in (first, second)]
    weights = [layer.weight + delta for layer, delta in zip(base(), deltas, strict=True)]
    model = PeftModel.from_pretrained(base(), str(out))
    torch.testing.assert_close(model(x), x @ weights[0].T @ weights[1].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.scaling * first.b @ first.a, 2.0 * factors_of(one, "0", 1).b @ first.a)


@pytest.mark.parametrize(
    ("options", "config", "expected"),
    [
        ({"use_dora": True}, {}, "has use_dora=True, which is more than B A"),
        ({}, {"peft_type": "VERA"}, "is an adapter of VERA, and only LORA"),
        (
            {},
            {"init_lora_weights": "pissa_niter_4"},
            "has init_lora_weights='pissa_niter_4', whose B A is beside another",
        ),
        ({}, {"init_lora_weights": "loftq"}, "has init_lora_weights='loftq'"),
        ({"lora_alpha": 0}, {}, "has lora_alpha=0 for .*adds nothing"),
        ({}, {"base_model_name_or_path": "other"}, "belongs to other and .* to None; merge adapters of one base"),
    ],
)
def test_what_is_not_merged(options: dict[str, Any], config: dict[str, Any], expected: str, tmp_path: Path):
    one, two = adapter(tmp_path / "one", 1), adapter(tmp_path / "two", 2, **options)
    file = two / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(ConfigError, match=expected):
        merge_adapters([one, two], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_no_adapter_of_this_model(tmp_path: Path):
    one, two = adapter(tmp_path / "one", 1), adapter(tmp_path / "two", 2)
    for folders, rank, expected in (
        ([one], None, "two adapters or more"),
        ([one, two], 0, "rank=0 leaves nothing"),
        ([one, tmp_path / "none"], None, "has no adapter_config.json"),
    ):
        with pytest.raises(ConfigError, match=expected):
            merge_adapters(folders, tmp_path / "out", rank=rank)
    with pytest.raises(ConfigError, match="exists already"):
        merge_adapters([one, two], one)
    weights = two / "adapter_model.safetensors"
    whole, tensors = weights.read_bytes(), load_file(weights)
    for changed, expected in (
        ({name: value[..., :-1].contiguous() for name, value in tensors.items()}, "has other sides than in"),
        ({name: value * torch.nan for name, value in tensors.items()}, "that are no numbers"),
        (
            {name: value for name, value in tensors.items() if "0.lora_B" not in name},
            "0.lora_A.weight without the factor",
        ),
        (
            {name: value for name, value in tensors.items() if "0.lora_A" not in name},
            "0.lora_B.weight without the factor",
        ),
        ({**tensors, "base_model.model.2.weight": torch.ones(1)}, "2.weight, which is no factor of a linear layer"),
    ):
        save_file(changed, weights)
        with pytest.raises(ConfigError, match=expected):
            merge_adapters([one, two], tmp_path / "out")
    weights.write_bytes(whole[:-9])
    with pytest.raises(ConfigError, match="cannot be read"):
        merge_adapters([one, two], tmp_path / "out")
    weights.unlink()
    with pytest.raises(ConfigError, match="has no adapter_model.safetensors"):
        merge_adapters([one, two], tmp_path / "out")
