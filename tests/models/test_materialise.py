"""Values depend on seed and name only: not on rank count, sharding, stages, adapters or their order."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.sites import Sites
from leanmill.core.stage import Slot, Stage
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.materialise import initialise_stages, make_materialiser
from tests.distributed import run_ranks
from tests.models.families import FAMILIES, tiny_config


class Drawn(Stage):
    """A stage with every kind of state: trained, fixed bool, random buffer, constant on the CPU."""

    slot: ClassVar[Slot] = Slot.MASK
    technique: ClassVar[str] = "drawn"

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(weight.shape[-2], 1, device="meta"))
        self.mask = nn.Parameter(torch.empty(weight.shape, dtype=torch.bool, device="meta"), requires_grad=False)
        self.register_buffer("noise", torch.empty(3, device="meta"), persistent=False)
        self.register_buffer("schedule", torch.full((1,), 0.25), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight * self.scale, 0.0)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.scale.normal_()
        self.mask.bernoulli_(0.5)
        self.noise.uniform_()


class TrainModuleLike(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


def staged_module(config: ModelConfig, adapters: bool = False) -> TrainModuleLike:
    model = build_on_meta(config)
    for site in Sites(model).select(["q*_proj", "down_proj"]):
        site.put(Drawn(site.raw_weight))
    if adapters:
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=3, target_modules=["v_proj", "o_proj"]), model)
    return TrainModuleLike(model)


def full_state(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: tensor.detach().clone() for name, tensor in full.items()}


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name in state:
        assert torch.equal(state[name], expected[name]), name


def test_seed_and_name_decide() -> None:
    config = ModelConfig(config=tiny_config("llama"))
    states = []
    for seed in (0, 0, 1):
        module = staged_module(config)
        torch.rand(5)  # the global generator plays no part
        before = torch.random.get_rng_state()
        make_materialiser(config, seed=seed)(module)
        assert torch.equal(before, torch.random.get_rng_state())
        states.append(full_state(module))
    assert_same(states[0], states[1])
    embedding = "model.model.embed_tokens.weight"
    assert not torch.equal(states[0][embedding], states[2][embedding])
    first, second = (states[0][f"model.model.layers.{i}.self_attn.q_proj.weight"] for i in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("family", FAMILIES)
def test_distribution_is_that_of_transformers(family: str) -> None:
    from transformers import AutoModelForCausalLM

    config = ModelConfig(config=tiny_config(family))
    model = build_on_meta(config)
    make_materialiser(config, seed=0)(TrainModuleLike(model))
    reference = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    ours, theirs = full_state(model), full_state(reference)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        other = theirs[name]
        if other.numel() > 200 and other.std() > 0:
            assert abs(value.std() / other.std() - 1) < 0.2, name
            assert abs(value.mean()) < 0.2 * value.std(), name
        elif other.std() == 0 or "inv_freq" in name:
            torch.testing.assert_close(value, other, rtol=0, atol=0, msg=name)
    assert any("inv_freq" in name for name in ours)


def test_stages_do_not_change_the_weights_and_keep_cpu_constants() -> None:
    config = ModelConfig(config=tiny_config("mixtral"))
    plain = build_on_meta(config)
    make_materialiser(config, seed=3)(plain)
    module = staged_module(config, adapters=True)
    make_materialiser(config, seed=3)(module)
    staged = full_state(module)
    for name, value in full_state(plain).items():
        key = f"model.{name}"
        if key not in staged:
            key = key.replace(".weight", ".base_layer.weight")
        assert torch.equal(staged[key], value), name
    stage = module.model.model.layers[0].self_attn.q_proj.stages["mask"]
    assert stage.schedule.item() == 0.25
    assert 0.3 < stage.mask.float().mean() < 0.7
    assert not stage.mask.requires_grad
    adapter = module.model.model.layers[0].self_attn.v_proj
    assert adapter.lora_B["default"].weight.count_nonzero() == 0
    assert adapter.lora_A["default"].weight.std() > 0
    other = module.model.model.layers[1].self_attn.v_proj
    assert not torch.equal(adapter.lora_A["default"].weight, other.lora_A["default"].weight)


def test_tied_weights_stay_one_parameter() -> None:
    config = ModelConfig(config=tiny_config("llama", tie_word_embeddings=True))
    model = build_on_meta(config)
    make_materialiser(config, seed=0)(TrainModuleLike(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_nobody_initialises_is_named() -> None:
    config = ModelConfig(config=tiny_config("llama"))
    model = build_on_meta(config)
    model.model.layers[1].extra = nn.ParameterDict({"gate": nn.Parameter(torch.empty(3, device="meta"))})
    with pytest.raises(RunError, match=r"layers\.1\.extra.*'gate'"):
        make_materialiser(config, seed=0)(TrainModuleLike(model))


def sharded_state(config: ModelConfig, mesh_shape: tuple[int, ...], offload: bool) -> dict[str, Tensor]:
    names = ("replicas", "shards")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    module = staged_module(config, adapters=True)
    options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
    for layer in module.model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(module, mesh=mesh, **options)
    make_materialiser(config, seed=0)(module)
    assert isinstance(module.model.model.norm.weight, DTensor)
    return full_state(module) | {"logits": module(torch.arange(8)[None]).detach()}


@pytest.mark.parametrize(
    ("world_size", "mesh_shape", "offload"), [(2, (2,), False), (3, (3,), True), (4, (2, 2), False)]
)
def test_values_do_not_depend_on_sharding(world_size: int, mesh_shape: tuple[int, ...], offload: bool) -> None:
    # 97 embedding rows, 8 norm entries and 3 adapter ranks over 2 or 3 ranks: shards are uneven.
    config = ModelConfig(config=tiny_config("qwen3_moe", tie_word_embeddings=True))
    module = staged_module(config, adapters=True)
    make_materialiser(config, seed=0)(module)
    expected = module(torch.arange(8)[None]).detach()
    for state in run_ranks(sharded_state, world_size, config, mesh_shape, offload):
        torch.testing.assert_close(state.pop("logits"), expected)
        assert_same(state, full_state(module))


@pytest.fixture(params=["qwen3_moe", "deepseek_v3", "llama"])
def checkpoint(request, tmp_path):
    config = ModelConfig(config=tiny_config(request.param))
    model = build_on_meta(config)
    make_materialiser(config, seed=5)(TrainModuleLike(model))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.uniform_()
    model.save_pretrained(tmp_path)
    return tmp_path, full_state(model)


def loaded_state(config: ModelConfig, shard: bool) -> dict[str, Tensor]:
    module = staged_module(config)
    if shard:
        for layer in module.model.model.layers:
            fully_shard(layer)
        fully_shard(module)
    make_materialiser(config, seed=0)(module)
    return full_state(module)


def test_a_checkpoint_fills_plain_and_sharded_models(checkpoint) -> None:
    # Experts are stored one by one in the checkpoint and fused in the model.
    path, expected = checkpoint
    config = ModelConfig(path=str(path))
    states = [loaded_state(config, False), *run_ranks(loaded_state, 2, config, True)]
    for state in states:
        for name, value in expected.items():
            assert torch.equal(state[f"model.{name}"], value), name
        assert_same(state, states[0])
    assert any("stages.mask.scale" in name for name in states[0])


def test_an_incomplete_or_misshapen_checkpoint_names_the_weights(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    config = ModelConfig(config=tiny_config("llama"))
    model = build_on_meta(config)
    make_materialiser(config, seed=5)(model)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    from_path = ModelConfig(path=str(tmp_path))
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=f"lacks 1 .*{name}"):
        make_materialiser(from_path, seed=0)(build_on_meta(from_path))
    save_file(weights | {name: torch.zeros(47, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=f"other shapes .*{name}"):
        make_materialiser(from_path, seed=0)(build_on_meta(from_path))


def test_a_stage_that_tied_weights_share_starts_from_the_weight_once() -> None:
    class Counting(Stage):
        slot: ClassVar[Slot] = Slot.MASK
        technique: ClassVar[str] = "counting"

        def __init__(self) -> None:
            super().__init__()
            self.seen = nn.Parameter(torch.zeros(1))

        def initialise(self, weight: torch.Tensor) -> None:
            self.seen.data += 1

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_config("llama")))
    sites = Sites(model)
    sites.put(sites.select(["embed_tokens", "lm_head", "q_proj"]), lambda site: Counting())
    initialise_stages(model)
    seen = [p.item() for name, p in model.named_parameters() if name.endswith("seen")]
    assert seen == [1.0, 1.0, 1.0]
