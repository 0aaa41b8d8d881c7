"""Weights read in parts are those that transformers loads, and no rank holds more than its share."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.core.errors import ConfigError
from leanmill.models import folder_weights
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.folder_weights import FolderWeights
from leanmill.models.materialise import make_materialiser
from leanmill.models.pretrained import load_weights
from leanmill.models.stored_weights import StoredWeights
from leanmill.parallel.expert_parallel import replicated_experts, spread_experts
from leanmill.parallel.layout import Layout
from tests.distributed import run_ranks
from tests.models.families import FAMILIES, tiny_config


MIXTRAL = {**tiny_config("mixtral"), "num_local_experts": 4}


def saved(folder: Path, config: dict[str, Any], *, dtype: torch.dtype = torch.float32, **options: Any) -> dict:
    """A model as transformers writes it; returns its weights by name in the module."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values), dtype=dtype)
    for tensor in model.state_dict().values():
        tensor.normal_()
    model.save_pretrained(folder, **options)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def stack_experts(folder: Path, state: dict[str, Tensor]) -> None:
    """Store the experts as the module holds them."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


def read(weights: FolderWeights, name: str, sizes: Any, *offsets: int, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full(tuple(sizes), torch.nan, dtype=dtype)
    weights.read_into(out, name, offsets or None)
    return out


def opened(folder: Path) -> FolderWeights:
    weights = FolderWeights.open(ModelConfig(path=str(folder)), downloads=False)
    assert weights is not None
    return weights


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "ernie4_5_moe"])
def test_names_and_values_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    saved(tmp_path, tiny_config(family), max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    weights = opened(tmp_path)
    loaded = load_weights(ModelConfig(path=str(tmp_path)), dtype=torch.float32).state_dict()
    assert weights.sources.keys() == loaded.keys()
    for name, value in loaded.items():
        assert torch.equal(read(weights, name, value.shape), value), name


@pytest.mark.parametrize("is_stacked", [False, True], ids=["one by one", "stacked"])
def test_any_box(tmp_path: Path, is_stacked: bool) -> None:
    state = saved(tmp_path, MIXTRAL, dtype=torch.bfloat16)
    if is_stacked:
        stack_experts(tmp_path, state)
    weights = opened(tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    for offsets, sizes in (([1, 40, 3], [2, 17, 5]), ([0, 0, 0], [4, 96, 32]), ([2, 48, 0], [2, 48, 32])):
        box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
        assert torch.equal(read(weights, name, sizes, *offsets), state[name][box].float())
    assert read(weights, name, [0, 96, 32], 4, 0, 0).numel() == 0
    dense = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(read(weights, dense, [3, 32], 5, 0, dtype=torch.bfloat16), state[dense][5:8])


def test_missing_and_surplus_experts_are_named(tmp_path: Path) -> None:
    saved(tmp_path, MIXTRAL)
    file, config = tmp_path / "model.safetensors", ModelConfig(path=str(tmp_path))
    stored = load_file(file)
    lost = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    save_file({key: value for key, value in stored.items() if key != lost}, file)
    with pytest.raises(ConfigError, match=f"lacks 1 weights .*: {lost}; give the complete checkpoint"):
        StoredWeights(config).take("lm_head.weight", torch.empty(97, 32))
    save_file(stored, file)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "num_local_experts": 3}))
    with pytest.raises(ConfigError, match="holds experts up to number 3, and its config describes 3 in a layer"):
        StoredWeights(config).take("lm_head.weight", torch.empty(97, 32))
    (tmp_path / "config.json").write_text(json.dumps({**written, "num_experts_per_tok": 5}))
    with pytest.raises(ConfigError, match="num_experts_per_tok=5 is more than num_local_experts=4; give at most 4"):
        build_on_meta(config)


def test_what_is_not_read_here_goes_through_transformers(tmp_path: Path) -> None:
    state = saved(tmp_path, tiny_config("llama"))
    config = ModelConfig(path=str(tmp_path))
    file = tmp_path / "model.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    stored = load_file(file)
    for change in ({name: torch.zeros(3, 3)}, None):
        save_file({**stored, **change} if change else {k: v for k, v in stored.items() if k != name}, file)
        assert FolderWeights.open(config, downloads=False) is None
        with pytest.raises(ConfigError, match=name):
            StoredWeights(config).take(name, state[name])
    file.write_bytes(file.read_bytes()[:-400])
    assert FolderWeights.open(config, downloads=False) is None
    with pytest.raises(ConfigError):
        StoredWeights(config).take(name, state[name])


def values_of(model: Any) -> dict[str, Tensor]:
    full = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in full.items()}


@pytest.mark.parametrize("sees", [True, False], ids=["all see the folder", "rank 0 alone"])
def test_ranks_read_their_own_experts_and_rows(tmp_path: Path, sees: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    state = saved(tmp_path, MIXTRAL)
    config = ModelConfig(path=str(tmp_path))
    real = folder_weights.weights_folder

    def elsewhere(config: ModelConfig, *, downloads: bool) -> Any:
        return real(config, downloads=downloads) if sees or downloads else None

    monkeypatch.setattr(folder_weights, "weights_folder", elsewhere)

    def body() -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        sizes: list[int] = []
        plain = FolderWeights.read_into

        def counted(self: FolderWeights, out: Tensor, *args: Any) -> None:
            plain(self, out, *args)
            sizes.append(out.numel())

        FolderWeights.read_into = counted  # type: ignore[method-assign]
        spread, sharded = build_on_meta(config), build_on_meta(config)
        layout = Layout(2, ep=2)
        spread_experts(spread, layout, *replicated_experts(layout))
        make_materialiser(config, seed=0)(spread)
        count = sum(sizes)
        for layer in sharded.model.layers:
            fully_shard(layer)
        fully_shard(sharded)
        make_materialiser(config, seed=0)(sharded)
        return values_of(spread), values_of(sharded), count

    results = run_ranks(body, 2)
    experts = sum(value.numel() for name, value in state.items() if "experts" in name)
    dense = sum(value.numel() for value in state.values()) - experts
    for spread, sharded, _ in results:
        for found in (spread, sharded):
            for name, value in found.items():
                assert torch.equal(value, state[name]), name
    counts = [count for *_, count in results]
    assert counts == ([dense + experts // 2, experts // 2] if sees else [dense + experts, 0])


LARGE = {
    **tiny_config("qwen3_moe"),
    "hidden_size": 256,
    "num_experts": 16,
    "moe_intermediate_size": 512,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
}


def status(field: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is Linux's")
@pytest.mark.parametrize("is_stacked", [False, True], ids=["one by one", "stacked"])
def test_peak_memory_of_a_rank_is_near_its_share(tmp_path: Path, is_stacked: bool) -> None:
    state = saved(tmp_path, LARGE)
    if is_stacked:
        stack_experts(tmp_path, state)
    whole = sum(4 * value.numel() for value in state.values())
    largest = max(4 * value.numel() for value in state.values())
    del state
    gc.collect()
    config = ModelConfig(path=str(tmp_path))
    build_on_meta(config)  # imports, once here instead of in every forked rank

    def body() -> tuple[int, int]:
        model = build_on_meta(config)
        layout = Layout(dist.get_world_size(), ep=dist.get_world_size())
        spread_experts(model, layout, *replicated_experts(layout))
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmHWM")
        make_materialiser(config, seed=0)(model)
        locals_ = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        return status("VmHWM") - before, sum(4 * p.numel() for p in locals_)

    for peak, share in run_ranks(body, 2):
        assert share < 0.6 * whole
        # Beside it, the half of the largest weight that is read: its pages of the file.
        assert peak < share + largest // 2 + 10 * 2**20 < 0.7 * whole, (peak, share, whole)


def test_copies_read_the_same(tmp_path: Path) -> None:
    state = saved(tmp_path, tiny_config("llama"))
    weights = copy.deepcopy(opened(tmp_path))
    embedding = state["model.embed_tokens.weight"]
    assert torch.equal(read(weights, "lm_head.weight", embedding.shape), embedding), "tied weights lie once"
