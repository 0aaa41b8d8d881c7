"""LoRA of which some ranks are used, against its equations: values, gradients, and what is saved and merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import leanmill.peft_ext  # noqa: F401 (registers)
from leanmill.core.errors import ConfigError
from leanmill.export import export_model
from leanmill.export.compare import reload
from leanmill.peft_ext.tuners.rank_lora import RankLoraConfig, RankLoraLayer
from tests.core.tiny import install, tiny
from tests.export.checkpoints import recipe_of, save, trained_model


OUT, IN, R, ALPHA = 7, 5, 6, 3.0


def layer_of(dtype: torch.dtype = torch.float32, **options: Any) -> RankLoraLayer:
    torch.manual_seed(1)
    base = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
    config = {"r": R, "alpha": ALPHA, "target_r": 4.0, "init_weights": False, **options}
    if config.get("variant") == "dylora":
        del config["target_r"]
    return RankLoraLayer(base, "default", RankLoraConfig(**config))


def check(layer: RankLoraLayer, expected: Any, names: tuple[str, ...], dtype: torch.dtype) -> None:
    """Compare output and gradients with `expected(x, *factors)` in fp32."""
    parameters = [getattr(layer, f"rank_lora_{name}")["default"] for name in names]
    x, upstream = torch.randn(2, 4, IN, dtype=dtype, requires_grad=True), torch.randn(2, 4, OUT).to(dtype)
    x0, *own = (t.detach().float().requires_grad_() for t in (x, *parameters))
    want = x0 @ layer.base_layer.weight.float().T + layer.base_layer.bias.float() + expected(x0, *own)
    out = layer(x)
    assert out.dtype == dtype
    out.backward(upstream)
    want.backward(upstream.float())
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(out.float(), want, **close)
    for got, reference in zip((x, *parameters), (x0, *own), strict=True):
        error = (got.grad.float() - reference.grad).abs().max()
        assert error <= (1e-5 if dtype is torch.float32 else 3e-2) * (1 + reference.grad.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_used_ranks_and_ranks_in_reserve(dtype: torch.dtype):
    """dW = alpha / n x sum of E_j b_j a_j over used ranks, and of 1e-5 b_j a_j over those in reserve."""
    layer = layer_of(dtype, init_r=2, grow_r=2)

    def expected(x: Tensor, a: Tensor, b: Tensor, e: Tensor) -> Tensor:
        used = sum(e[j] * torch.outer(b[:, j], a[j]) for j in range(2))
        reserved = sum(1e-5 * torch.outer(b[:, j], a[j]) for j in range(2, 4))
        return x @ (ALPHA / 2 * (used + reserved)).T

    check(layer, expected, ("A", "B", "E"), dtype)
    grad_a = layer.rank_lora_A["default"].grad
    assert (grad_a[2:4] != 0).any(1).all(), "ranks in reserve learn in advance"
    assert not grad_a[4:].any()
    assert not layer.rank_lora_E["default"].grad[2:].any(), "their E does not"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_nested_ranks(frozen: bool, dtype: torch.dtype):
    """DyLoRA, algorithm 1: y = W x + alpha / b x B[:, :b] A[:b] x; in its frozen mode row and column b alone learn."""
    layer = layer_of(dtype, variant="dylora", frozen=frozen)
    layer.use_rank(4)

    def expected(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        kept_a = torch.cat([a[:3].detach(), a[3:4]]) if frozen else a[:4]
        kept_b = torch.cat([b[:, :3].detach(), b[:, 3:4]], 1) if frozen else b[:, :4]
        return ALPHA / 4 * x @ (kept_b @ kept_a).T

    check(layer, expected, ("A", "B"), dtype)
    assert layer.rank_lora_A["default"].grad.any(1).tolist() == [not frozen] * 3 + [True, False, False]


def test_all_ranks_are_lora_and_starts_are_the_base():
    layer, x = layer_of(variant="dylora"), torch.randn(3, IN)
    a, b = layer.rank_lora_A["default"], layer.rank_lora_B["default"]
    torch.testing.assert_close(layer(x), layer.base_layer(x) + ALPHA / R * x @ (b @ a).T)
    fresh = layer_of(variant="dylora", init_weights=True)
    torch.testing.assert_close(fresh(x), fresh.base_layer(x), rtol=0, atol=0)
    grown = layer_of(init_weights=True)
    torch.testing.assert_close(grown(x), grown.base_layer(x), rtol=0, atol=1e-6)
    assert grown.rank_lora_E["default"].tolist() == pytest.approx([0.0, *[1e-5] * (R - 1)])
    assert grown.rank_lora_A["default"].std() < 0.04


def base() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, IN))
    model.config = {"model_type": "custom"}  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("rank", [1, 3, R])
def test_an_adapter_is_used_saved_and_merged_at_any_of_its_ranks(rank: int, tmp_path):
    config = RankLoraConfig(r=R, variant="dylora", target_modules=["0", "1"], init_weights=False)
    model, x = get_peft_model(base(), config).eval(), torch.randn(9, IN)
    full = model(x)
    model.base_model.use_rank(rank)
    cut = model(x)
    assert torch.equal(cut, full) == (rank == R)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(reloaded(x), cut, rtol=0, atol=0)
    assert torch.linalg.matrix_rank(reloaded.base_model.model[0].get_delta_weight("default")) == min(rank, IN)
    torch.testing.assert_close(reloaded.merge_and_unload()(x), cut, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=f"rank=7 must be from 1 to r={R}"):
        model.base_model.use_rank(7)


def test_ranks_that_were_earned_are_saved(tmp_path):
    config = RankLoraConfig(r=R, target_r=3.0, target_modules=["0", "1"], init_weights=False)
    model, x = get_peft_model(base(), config).eval(), torch.randn(9, IN)
    model.base_model.model[1].rank_lora_count["default"].copy_(torch.tensor([5, 0]))
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(reloaded(x), model(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="no dylora: its layers have the ranks that they were given"):
        model.base_model.use_rank(2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"variant": "nested"}, "variant must be one of increlora, dylora"),
        ({"used_r": 4}, "used_r belongs to variant=dylora, and variant=increlora"),
        ({"variant": "dylora", "grow_every": 3}, "grow_every belongs to variant=increlora"),
        ({"variant": "dylora", "least_r": 17}, "least_r=17 must be from 1 to r=16"),
        ({"variant": "dylora", "used_r": 0}, "used_r must be an integer of at least 1"),
        ({"target_r": 17}, "target_r=17 must be from 1 to r=16"),
        ({"init_r": 9}, "target_r=8.0 must be from 9 to r=16"),
        ({"score": "luck"}, "score must be product or factors"),
        ({"sensitivity_decay": 1.0}, r"sensitivity_decay must be in \[0, 1\)"),
        ({"orthogonality": -1.0}, "orthogonality must be finite and not negative"),
    ],
)
def test_what_is_refused(options: dict, expected: str):
    with pytest.raises(ValueError, match=expected):
        RankLoraConfig(**options)
    with pytest.raises(ConfigError, match=expected):
        install(tiny("llama"), {"type": "peft", "method": "rank_lora", **options})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("used", [None, 2])
def test_a_run_is_exported_at_the_rank_that_its_recipe_names(used: int | None, precision: str, tmp_path):
    technique = {"type": "peft", "method": "rank_lora", "variant": "dylora", "r": 4, "alpha": 4, "targets": ["q_proj"]}
    recipe = recipe_of("llama", [technique | ({} if used is None else {"used_r": used})], precision=precision)
    model = trained_model(recipe)
    layer = model.model.layers[0].self_attn.q_proj
    a, b = (getattr(layer, f"rank_lora_{name}")["default"].detach() for name in "AB")
    rank = used or 4
    expected = layer.base_layer.weight.detach() + 4 / rank * b[:, :rank] @ a[:rank]
    export_model(save(model, recipe, tmp_path / "run"), tmp_path / "out")
    found = reload(tmp_path / "out").model.layers[0].self_attn.q_proj.weight
    # What a frozen base is rounded to, in bf16.
    tolerance = {"rtol": 0, "atol": 1e-6} if precision == "fp32" else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(found, expected.float(), **tolerance)
