"""Our tuners are PEFT methods: to whoever imports PEFT before us or after, saved, reloaded, several at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from torch import nn

from leanmill.peft_ext.registration import TUNERS, register_with_peft


CASES: dict[str, dict[str, Any]] = {
    "bottleneck": {"r": 3},
    "core_lora": {"r": 3, "variant": "lora_xs"},
    "moe_lora": {"r": 2, "num_experts": 3},
    "mos": {"r": 4, "pool_rank": 2, "num_shards": 2},
    "nola": {"r": 3, "num_basis": 6},
    "rank_lora": {"r": 3, "target_r": 2.0, "init_r": 2},
}
NO_MATRIX = ("bottleneck", "moe_lora")
"""These cannot be merged, see their own tests."""


def base() -> nn.Module:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 12))
    model.config = {"model_type": "custom"}  # type: ignore[assignment]
    return model.eval()


def config_of(name: str, **changes: Any) -> Any:
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name.upper())]
    return kind(target_modules=["0", "2", "4"], init_weights=False, **{**CASES[name], **changes})


def test_every_tuner_is_a_method():
    assert TUNERS.keys() == CASES.keys()
    before = list(PeftType)
    register_with_peft()
    assert list(PeftType) == before


@pytest.mark.parametrize("name", CASES)
def test_saved_and_reloaded_without_a_warning(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder):
    x = torch.randn(3, 8)
    model = get_peft_model(base(), config_of(name)).eval()
    expected = model(x)
    model.save_pretrained(tmp_path)
    assert type(PeftConfig.from_pretrained(tmp_path)) is type(config_of(name))
    recwarn.clear()
    torch.manual_seed(99)
    reloaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert [str(w.message) for w in recwarn] == []
    torch.testing.assert_close(reloaded(x), expected, rtol=0, atol=0)
    assert (expected - base()(x)).abs().max() > 1e-3
    if name in NO_MATRIX:
        return
    merged = reloaded.merge_and_unload(safe_merge=True)
    _is_close(merged(x), expected)
    assert type(merged[0]) is nn.Linear


@pytest.mark.parametrize("name", CASES)
def test_several_adapters_on_one_layer(name: str):
    x, plain = torch.randn(3, 8), base()
    model = get_peft_model(plain, config_of(name), adapter_name="one").eval()
    one = model(x)
    model.add_adapter("two", config_of(name, r=2, **({"private_rank": 0} if name == "mos" else {})))
    torch.testing.assert_close(model(x), one, rtol=0, atol=0)
    model.set_adapter("two")
    two = model(x)
    assert not torch.allclose(one, two)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base()(x), rtol=0, atol=0)
    if name not in NO_MATRIX:
        _merges(model, x, two)
    model.delete_adapter("two")
    model.set_adapter("one")
    _is_close(model(x), one)


def _merges(model: Any, x: torch.Tensor, two: torch.Tensor) -> None:
    model.merge_adapter()
    _is_close(model(x), two)
    model.unmerge_adapter()
    _is_close(model(x), two)


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """In fp32 of the largest: what cancels in one output leaves the rounding of what was added."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=max(1e-5, 1e-6 * float(expected.abs().max())))


@pytest.mark.slow
@pytest.mark.parametrize("first", ["peft", "leanmill.peft_ext"])
def test_either_import_may_come_first(first: str):
    second = "leanmill.peft_ext" if first == "peft" else "peft"
    lines = [
        f"import sys, {first}",
        f"assert {first == 'peft'} or not {{'peft', 'torch'}} & sys.modules.keys()",
        "from importlib.util import find_spec; find_spec('peft')",
        f"import {second}; from peft import get_peft_config",
        "get_peft_config({'peft_type': 'MOS'})",
        "from importlib.resources import files; assert files('peft').joinpath('__init__.py').is_file()",
    ]
    subprocess.run([sys.executable, "-W", "ignore", "-c", "\n".join(lines)], check=True)
