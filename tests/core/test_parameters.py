"""Parameter rules: what they set, and that two which differ are refused."""

import pytest
import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.parameters import ParamRule, ParamSettings, apply_trainable, settings_by_name


def _rule(technique, part, trainable=None, **settings):
    return ParamRule(
        technique=technique, match=lambda name: part in name, settings=ParamSettings(**settings), trainable=trainable
    )


def test_rules_that_agree_or_speak_of_other_things_add_up():
    rules = [
        _rule("a", "up", lr_factor=2.0),
        _rule("b", "weight", weight_decay=0.0, lr_factor=2.0),
        _rule("c", "up", betas=(0.5, 0.9)),
    ]
    assert settings_by_name(rules, ["up.weight", "up.bias", "down.weight", "norm.bias"]) == {
        "up.weight": ParamSettings(lr_factor=2.0, weight_decay=0.0, betas=(0.5, 0.9)),
        "up.bias": ParamSettings(lr_factor=2.0, betas=(0.5, 0.9)),
        "down.weight": ParamSettings(lr_factor=2.0, weight_decay=0.0),
    }


def test_rules_that_differ_are_refused_with_both_names():
    rules = [_rule("first", "up", lr_factor=2.0), _rule("second", "weight", lr_factor=3.0)]
    assert settings_by_name(rules, ["up.bias", "down.weight"]).keys() == {"up.bias", "down.weight"}
    with pytest.raises(ConfigError, match=r"first sets lr_factor of up\.weight to 2\.0, second sets it to 3\.0"):
        settings_by_name(rules, ["up.weight"])


def test_what_trains():
    model = nn.ModuleDict({"up": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    model["up"].mask = nn.Parameter(torch.ones(2, 2, dtype=torch.bool), requires_grad=False)
    frozen = {id(p) for p in model.parameters()}
    apply_trainable(
        [_rule("a", "bias", trainable=True), _rule("a", "mask", trainable=True)], model.named_parameters(), frozen
    )
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"up.bias", "norm.bias"}
    apply_trainable([_rule("b", "up.bias", trainable=False)], model.named_parameters(), ())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"norm.bias"}
    with pytest.raises(ConfigError, match=r"a sets trainable of up\.bias to True, b sets it to False"):
        apply_trainable(
            [_rule("a", "bias", trainable=True), _rule("b", "up", trainable=False)], model.named_parameters(), ()
        )
