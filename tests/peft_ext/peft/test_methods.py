"""Every method that PEFT lists trains, is saved, and reloads by PEFT to equal logits; or is refused with a reason."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from leanmill.checkpoint.manager import CheckpointManager
from leanmill.core.branches import branch_tensors, branched_layers
from leanmill.core.errors import ConfigError
from leanmill.core.sites import Sites
from leanmill.export import export_model
from leanmill.export.folding import detach_adapters, fold
from leanmill.export.wrapped import take_wrapped, write_wrapped
from leanmill.models.pretrained import load_frozen
from leanmill.peft_ext.peft.methods import METHODS, REFUSED
from leanmill.trainer.beginning import saved_part
from tests.core.tiny import loss_of
from tests.export.checkpoints import HeldModel, recipe_of, save, trained_model
from tests.export.test_hf import logits
from tests.peft_ext.peft.cases import raw_of


def test_the_table_is_pefts_own_list():
    assert {name.value.lower() for name in PEFT_TYPE_TO_CONFIG_MAPPING} == METHODS.keys() | REFUSED.keys()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    trained_model(recipe_of("qwen3", [])).save_pretrained(folder)
    return folder


def after_two_steps(raw: dict[str, Any], base: Path) -> Any:
    model = trained_model(recipe_of("qwen3", [raw], path=base)).train()
    kept = {path: t.clone() for path, t, _ in branch_tensors(model) if not t.requires_grad}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() <= {path for path, _, _ in branch_tensors(model)}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for seed in range(2):
        optimizer.zero_grad()
        loss_of(model, torch.randint(97, (2, 13), generator=torch.Generator().manual_seed(seed))).backward()
        optimizer.step()
    still = [name for name, p in trained.items() if torch.equal(p, before[name])]
    assert len(still) < len(trained) / 2, still
    assert all(torch.equal(t, kept[path]) for path, t, _ in branch_tensors(model) if path in kept)
    return model.eval()


UNLIKE_EACH_OTHER = ("core_lora", "hra", "lily", "ln_tuning", "mos", "shira", "trainable_tokens", "vera")
"""A mechanism each: a start from the weight, a weight that is read, no merged form, norms, pools, places, a table."""


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=() if name in UNLIKE_EACH_OTHER else pytest.mark.slow)
        for name in METHODS
        if name != "lora"
    ],
)
def test_a_method_trains_reloads_and_merges(method: str, base: Path, tmp_path: Path):
    model = after_two_steps(raw_of(method), base)
    expected, plain = logits(model), load_frozen(str(base))
    wrapped = take_wrapped(model)
    assert wrapped is not None
    (tmp_path / "out").mkdir()
    write_wrapped(tmp_path / "out", copy.deepcopy(plain), wrapped, str(base), None)
    assert (expected - logits(plain)).abs().max() > 1e-3
    reloaded = PeftModel.from_pretrained(plain, str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(reloaded), expected, rtol=1e-4, atol=1e-5)
    if method in ("beft", "bottleneck", "lily", "moe_lora"):
        with pytest.raises(ConfigError, match="no weight that could be merged.*--to adapter"):
            fold(model)
    else:
        fold(model)
        assert not list(branched_layers(model))
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(raw_of("vblora"), marks=pytest.mark.slow),
        pytest.param(raw_of("lora", r=4, use_dora=True), marks=pytest.mark.slow),
        raw_of("lora", r=4, init_lora_weights="pissa"),
        pytest.param(raw_of("lora", r=4, rank_pattern={"down_proj": 2}), marks=pytest.mark.slow),
    ],
    ids=lambda raw: f"{raw['method']}-{len(raw)}",
)
def test_a_checkpoint_is_exported(raw: dict[str, Any], base: Path, tmp_path: Path):
    recipe = recipe_of("qwen3", [raw], path=base)
    model = after_two_steps(raw, base)
    out = export_model(save(model, recipe, tmp_path / "run"), tmp_path / "out", to="adapter").path
    moves = raw.get("init_lora_weights") == "pissa"
    reloaded = PeftModel.from_pretrained(load_frozen(str(out / "base" if moves else base)), str(out)).eval()
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-5)
    written = json.loads((out / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(out / "base" if moves else base)
    assert written["peft_type"] == raw["method"].upper()


def test_a_checkpoint_holds_the_adapter_alone_and_knows_its_base(base: Path, tmp_path: Path):
    raw = raw_of("psoft")
    recipe, model = recipe_of("qwen3", [raw], path=base), after_two_steps(raw, base)
    trained = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    prepared: Any = SimpleNamespace(techniques=SimpleNamespace(freeze_base=True), trained=trained)
    part = saved_part(recipe, model, prepared)
    assert part["names"] == {path for path, _, _ in branch_tensors(model)}
    assert any("cache" in name for name in part["names"]), "what came of the weight at the start"
    manager = CheckpointManager(tmp_path / "run", recipe.checkpoint)
    manager.save(3, HeldModel(model), {"step": 3}, recipe.model_dump(mode="json"), **part)  # type: ignore[arg-type]
    checkpoint = manager.latest()
    assert checkpoint is not None
    out = export_model(checkpoint, tmp_path / "out", to="adapter").path
    reloaded = PeftModel.from_pretrained(load_frozen(str(base)), str(out)).eval()
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-5)
    moved = recipe_of("qwen3", [raw_of("lora", r=4, init_lora_weights="pissa")], path=base)
    assert saved_part(moved, model, prepared) == {}, "a start that moves a part of the base saves all"


def test_pissa_starts_as_the_base_and_takes_its_largest_part(base: Path):
    raw = raw_of("lora", r=4, lora_alpha=4, init_lora_weights="pissa", targets=["q_proj"])
    recipe = recipe_of("qwen3", [raw], path=base)
    torch.manual_seed(0)
    model = trained_model(recipe)
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name)
    plain = load_frozen(str(base))
    layer, weight = model.model.layers[0].self_attn.q_proj, plain.model.layers[0].self_attn.q_proj.weight
    u, s, v = torch.linalg.svd(weight)
    torch.testing.assert_close(layer.base_layer.weight, u[:, 4:] @ s[4:].diag() @ v[4:], rtol=1e-4, atol=1e-5)
    detach_adapters(model)
    assert (logits(model) - logits(plain)).abs().max() > 1e-2


@pytest.mark.slow
def test_what_does_not_depend_on_the_weight_is_marked_so(base: Path):
    """Starts of the others are asked of a model with zeros for weights, so a dependence would go unnoticed."""
    from leanmill.peft_ext.peft.inject import _Wrapping

    for method, known in METHODS.items():
        if known.starts_from_weight:
            continue
        found = []
        for _ in range(2):
            model = load_frozen(str(base))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_()
            sites = Sites(model)
            config = _config_of(method, sites)
            _Wrapping(method, config, 0, False, False).around(model)
            found.append({path: tensor for path, tensor, _ in branch_tensors(model)})
        assert all(torch.equal(found[0][path], found[1][path]) for path in found[0]), method


def _config_of(method: str, sites: Sites) -> Any:
    from leanmill.peft_ext.peft.inject import _peft_config

    raw = raw_of(method)
    options = {key: value for key, value in raw.items() if key not in ("type", "method", "targets")}
    return _peft_config(method, options, [c.name for c in sites.find(raw["targets"])], 0)
