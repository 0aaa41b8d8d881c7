from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.core.copies import cpu_copy
from leanmill.core.places import find_modules
from leanmill.core.site import LinearSite
from leanmill.report.loggers.sites import (
    FILE_NAME,
    MAX_LEVELS,
    NUM_BINS,
    PathNorms,
    SiteStatistics,
    pq_index,
    site_statistics,
    weight_statistics,
)
from tests.trainer.fake_run import FakeEngine, TernaryWithScale, fake_eval, fake_info, fake_recipe, play, tiny_model


def test_statistics_of_a_weight_counted_by_hand() -> None:
    weight = torch.tensor(
        [[0.0, 0.0, 1.0, -2.0, 0.0, 0.0, 0.0, 0.0, 9.0], [1.0, 1.0, 1.0, 1.0, 0.0, 2.0, 2.0, 2.0, 9.0]]
    )
    found = weight_statistics(weight)
    assert found["shape"] == [2, 9]
    assert found["zero_fraction"] == pytest.approx(7 / 18)
    assert found["group_zeros"] == [1, 1, 1, 0, 1]  # the ninth column is no whole group
    assert found["two_of_four"] == pytest.approx(2 / 4)
    assert found["num_levels"] == 5
    assert found["num_levels_per_row"] == 4
    assert (found["low"], found["high"]) == (-9.0, 9.0)
    assert sum(found["histogram"]) == 18
    assert len(found["histogram"]) == NUM_BINS
    assert found["histogram"][-1] == 2
    assert found["num_non_finite"] == 0


def test_a_scale_per_row_shows_in_the_levels() -> None:
    weight = torch.tensor([-1.0, 0.0, 1.0]).repeat(16, 4) * torch.arange(1, 17)[:, None]
    found = weight_statistics(weight)
    assert (found["num_levels"], found["num_levels_per_row"]) == (33, 3)


def test_continuous_weights_hit_the_cap_and_experts_are_covered() -> None:
    torch.manual_seed(0)
    found = weight_statistics(torch.randn(3, 40, 400))
    assert (found["num_levels"], found["num_levels_per_row"]) == (MAX_LEVELS, MAX_LEVELS)
    assert found["shape"] == [3, 40, 400]
    assert found["two_of_four"] == 0.0


def test_large_weights_are_sampled_for_levels_and_counted_in_full_otherwise() -> None:
    weight = torch.ones(2048, 1024)
    weight[1] = 0.0
    found = weight_statistics(weight)
    assert found["zero_fraction"] == pytest.approx(1 / 2048)
    assert sum(found["histogram"]) == weight.numel()


@pytest.mark.parametrize("weight", [torch.zeros(3, 5), torch.full((2, 2), float("nan")), torch.full((1, 1), 7.0)])
def test_degenerate_weights_have_a_histogram_with_a_width(weight: torch.Tensor) -> None:
    found = weight_statistics(weight)
    assert found["high"] > found["low"]
    assert sum(found["histogram"]) + found["num_non_finite"] == weight.numel()


def test_statistics_are_those_of_the_effective_weight() -> None:
    engine = FakeEngine(tiny_model())
    found = {site["name"]: site for site in site_statistics(engine)}
    assert list(found) == [f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in ("q_proj", "down_proj")]
    for name, site in found.items():
        live = engine.module.model.get_submodule(name)
        assert site["zero_fraction"] == pytest.approx((live.effective_weight() == 0).float().mean().item())
        assert site["two_of_four"] == 1.0
    down = found["model.layers.1.down_proj"]
    assert down["techniques"] == ["nm_sparsity", "ternary"]
    assert (down["num_levels"], down["high"]) == (3, 0.5)


def test_every_rank_gathers_the_same_names_and_only_rank_0_computes(tmp_path: Path) -> None:
    writers = [SiteStatistics(tmp_path / str(rank)) for rank in (0, 1)]
    infos = [fake_info(fake_recipe(tmp_path), tmp_path, rank=rank) for rank in (0, 1)]
    for writer, info in zip(writers, infos, strict=True):
        play([writer], info, until=50)
    assert infos[0].engine.asked == infos[1].engine.asked
    assert len(infos[0].engine.asked) == 6  # four weights and two learned scales, once: step 50 is also the end
    assert (tmp_path / "0" / FILE_NAME).exists()
    assert not (tmp_path / "1" / FILE_NAME).exists()


def test_document_says_when_it_was_taken(tmp_path: Path) -> None:
    play([SiteStatistics(tmp_path)], fake_info(fake_recipe(tmp_path), tmp_path), until=60)
    document = json.loads((tmp_path / FILE_NAME).read_text())
    assert (document["step"], document["tokens"]) == (60, 60 * 32_768)
    assert len(document["sites"]) == 4


def test_what_evaluations_found_is_kept_over_a_resume(tmp_path: Path) -> None:
    play([SiteStatistics(tmp_path)], fake_info(fake_recipe(tmp_path), tmp_path), until=160, status=None)
    history = json.loads((tmp_path / FILE_NAME).read_text())["history"]
    assert [one["step"] for one in history] == [50, 100, 150]
    sites = history[0]["sites"]
    assert sites["model.layers.1.down_proj"]["num_levels"] == 3
    assert sites["model.layers.1.down_proj"]["norm"] > 0
    info = fake_info(fake_recipe(tmp_path), tmp_path, start_step=100)
    play([SiteStatistics(tmp_path)], info, until=210, status=None)
    again = json.loads((tmp_path / FILE_NAME).read_text())["history"]
    assert [one["step"] for one in again] == [50, 100, 150, 200]
    (tmp_path / FILE_NAME).write_text("{cut")
    play([SiteStatistics(tmp_path)], info, until=160, status=None)
    assert [one["step"] for one in json.loads((tmp_path / FILE_NAME).read_text())["history"]] == [150]


def test_the_norm_is_that_of_what_is_finite() -> None:
    assert weight_statistics(torch.tensor([[3.0, -4.0, float("inf")]]))["norm"] == pytest.approx(5.0)


def test_the_pq_index_is_the_papers_of_what_is_left() -> None:
    weight = torch.tensor([[3.0, 0.0, -1.0], [0.0, 4.0, 0.5]], dtype=torch.float64)
    left = torch.tensor([3.0, 1.0, 4.0, 0.5], dtype=torch.float64)
    p, q = 0.5, 1.0
    norm = lambda r: left.pow(r).sum().pow(1 / r)  # noqa: E731
    assert pq_index(weight) == pytest.approx(float(1 - 4 ** (1 / q - 1 / p) * norm(p) / norm(q)))
    assert pq_index(torch.tensor([[0.5, -0.5, 0.0]])) == pytest.approx(0, abs=1e-15)
    assert pq_index(torch.tensor([[1.0] + [1e-9] * 999])) > 0.99
    assert pq_index(torch.zeros(2, 2)) is None
    assert pq_index(torch.tensor([[float("nan"), 1.0]])) is None


@pytest.mark.parametrize(("family", "power"), [("llama", 2), ("gpt_neox", 1)])
def test_path_norms_count_every_path_and_bound_the_mlp(family: str, power: int) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=97, **sizes)).requires_grad_(False)
    norms = PathNorms(SimpleNamespace(module=SimpleNamespace(model=model)))  # type: ignore[arg-type]
    mlps = [(path, mlp) for path, _, mlp in find_modules(model, "mlp")]
    for path, mlp in mlps:
        weights = [(name, module.weight) for name, module in mlp.named_modules() if isinstance(module, nn.Linear)]
        for name, weight in weights:
            norms.see(f"{path}.{name}", weight)
    found = norms.found()
    assert list(found) == [path for path, _ in mlps]
    for path, mlp in mlps:
        *before, after = [m for m in mlp.modules() if isinstance(m, nn.Linear)]
        paths = torch.ones(after.in_features, dtype=torch.float64)
        for layer in before:
            paths = paths * (layer.weight.abs().double() @ torch.ones(layer.in_features, dtype=torch.float64))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if after.bias is not None:
            nn.init.zeros_(after.bias)
        assert found[path] == pytest.approx(float((after.weight.abs().double() @ paths).sum()))
        rows = torch.randn(50, before[0].in_features)
        assert (mlp(rows).abs().sum(-1) <= found[path] * rows.abs().amax(-1) ** power).all()


def test_an_mlp_of_which_not_all_is_seen_has_no_path_norm(tmp_path: Path) -> None:
    play([SiteStatistics(tmp_path)], fake_info(fake_recipe(tmp_path), tmp_path), until=60)
    assert json.loads((tmp_path / FILE_NAME).read_text())["path_norms"] == {}


def test_a_failed_run_gathers_nothing_more(tmp_path: Path) -> None:
    info = fake_info(fake_recipe(tmp_path), tmp_path)
    writer = SiteStatistics(tmp_path)
    writer.on_start(info)
    writer.on_end("failed", "a rank died")
    assert info.engine.asked == []
    writer.on_eval(fake_eval(0))
    assert len(info.engine.asked) == 6


def test_a_model_without_sites_gives_an_empty_list(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(4, 4))
    play([SiteStatistics(tmp_path)], fake_info(fake_recipe(tmp_path), tmp_path, engine=FakeEngine(plain)), until=2)
    assert json.loads((tmp_path / FILE_NAME).read_text())["sites"] == []


def test_copies_carry_no_hooks_and_leave_the_original_alone() -> None:
    stage = TernaryWithScale(3)
    stage.register_forward_pre_hook(lambda *_: pytest.fail("an engine's hook ran"))
    stage.learned.register_forward_hook(lambda *_: pytest.fail("an engine's hook ran"))
    original = stage.learned.scale
    copied = cpu_copy(stage, {"learned.scale": torch.full((3, 1), 2.0)})
    weight = torch.tensor([[0.5, -0.5, 0.0]]).repeat(3, 1)
    assert torch.equal(copied(weight), torch.tensor([[2.0, -2.0, 0.0]]).repeat(3, 1))
    assert stage.learned.scale is original
    assert len(stage._forward_pre_hooks) == 1
    assert torch.equal(original, torch.full((3, 1), 0.5))


def test_a_site_inside_wrappers_is_found_under_its_plain_name() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._checkpoint_wrapped_module = inner

    model = nn.Module()
    model.block = Wrapper(nn.Sequential(LinearSite.adopt(nn.Linear(8, 3), "block.0")))

    class WrappedEngine(FakeEngine):
        def full_parameter(self, name: str) -> torch.Tensor:
            assert name == "block.0.weight"
            return model.block._checkpoint_wrapped_module[0].weight

    assert [site["name"] for site in site_statistics(WrappedEngine(model))] == ["block.0"]
