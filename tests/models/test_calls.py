"""A staged weight that a model uses without calling its layer is refused, before anything trains."""

from __future__ import annotations

import types
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import ConfigError
from leanmill.core.sites import Sites
from leanmill.core.stage import InputSlot, InputStage, Slot, Stage
from leanmill.models.build import build_on_meta
from leanmill.models.calls import check_sites_are_called
from leanmill.models.config import ModelConfig
from tests.models.families import FAMILIES, tiny_config


class Halved(Stage):
    slot: ClassVar[Slot] = Slot.QUANT
    technique: ClassVar[str] = "halved"

    def forward(self, weight: Tensor) -> Tensor:
        raise AssertionError("stages are not needed to see who is called")


class Rounded(InputStage):
    slot: ClassVar[InputSlot] = InputSlot.QUANT
    technique: ClassVar[str] = "rounded"


def staged(family: str, *patterns: str, stage: Any = Halved) -> Any:
    model = build_on_meta(ModelConfig(config=tiny_config(family)))
    for site in Sites(model).select(list(patterns) or None):
        if stage is Halved:
            site.put(stage())
        else:
            site.put_input(stage())
    return model


def reading_its_weight(self: nn.Module, hidden: Tensor) -> Tensor:
    return F.linear(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden), self.down_proj.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_call_all_of_their_layers(family: str) -> None:
    model = staged(family, "*").train()
    check_sites_are_called(model)
    assert model.training
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("stage", [Halved, Rounded])
def test_a_layer_whose_weight_is_read_behind_its_back_is_refused(stage: Any) -> None:
    model = staged("llama", "*_proj", stage=stage)
    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(reading_its_weight, mlp)
    name = stage.technique
    with pytest.raises(
        ConfigError,
        match=rf"never calls model\.layers\.1\.mlp\.down_proj \(1 of 14 staged weights\).*{name} would do nothing "
        rf"there; add 'model\.layers\.1\.mlp\.down_proj' to {name}\.exclude",
    ):
        check_sites_are_called(model)
    assert "forward" not in vars(mlp.up_proj)
    untouched = staged("llama", "q_proj", stage=stage)
    untouched.model.layers[1].mlp.forward = types.MethodType(reading_its_weight, untouched.model.layers[1].mlp)
    check_sites_are_called(untouched)


def test_a_family_that_cannot_run_on_meta_is_let_pass() -> None:
    model = staged("llama", "*_proj")
    norm = model.model.norm
    norm.forward = lambda hidden: hidden * float(hidden.sum())
    check_sites_are_called(model)


def test_nothing_runs_where_nothing_is_staged() -> None:
    model = build_on_meta(ModelConfig(config=tiny_config("llama")))
    model.forward = None
    check_sites_are_called(model)
    assert torch.is_grad_enabled()
