import pytest
import torch
from torch import nn

from leanmill.models import flops
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig


def _build(**config):
    return build_on_meta(ModelConfig(config={"vocab_size": 96, **config}))


def _llama(**more):
    return _build(
        model_type="llama",
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        **more,
    )


LLAMA_LAYER = 48 * 60 + 2 * 48 * 20 + 60 * 48 + 3 * 48 * 80


@pytest.mark.parametrize("tied", [True, False])
def test_dense_count_matches_the_formula_written_out(tied):
    model = _llama(tie_word_embeddings=tied)
    matmul = 3 * LLAMA_LAYER + 96 * 48  # the head multiplies, tied or not; the lookup does not
    assert flops.active_matmul_parameters(model) == matmul
    assert flops.flops_per_token(model, 32) == 6 * matmul + 12 * 3 * 6 * 10 * 32


def test_experts_count_by_the_share_that_is_used():
    model = _build(
        model_type="qwen3_moe",
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=False,
    )
    attention = 2 * 32 * 32 + 2 * 32 * 16
    used = 2 * 3 * 32 * 24
    router = 8 * 32
    assert flops.active_matmul_parameters(model) == 2 * (attention + used + router) + 96 * 32


def test_latent_attention_uses_both_widths():
    model = _build(
        model_type="deepseek_v3",
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_nope_head_dim=12,
        qk_rope_head_dim=4,
        v_head_dim=10,
    )
    assert flops.attention_flops_per_token(model.config, 7) == 6 * 2 * 4 * (16 + 10) * 7


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("q_rank", [None, 20])
def test_latent_attention_is_counted_as_its_equations_say_and_as_torch_counts(family, q_rank):
    """arXiv:2405.04434, equations 37 to 47: parameters by hand, then torch's own count of a forward."""
    from torch.utils.flop_counter import FlopCounterMode

    from leanmill.core.sites import Sites

    d, heads, latent, rope, nope, value, layers, length = 40, 4, 12, 8, 10, 6, 3, 16
    model = _build(
        model_type=family,
        hidden_size=d,
        intermediate_size=56,
        moe_intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=latent,
        q_lora_rank=q_rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=value,
    )
    query = d * heads * (nope + rope) if q_rank is None else d * q_rank + q_rank * heads * (nope + rope)
    attention = query + d * (latent + rope) + latent * heads * (nope + value) + heads * value * d
    experts = (2 + 1) * 3 * d * 24 + 6 * d  # chosen, shared, router
    matmul = layers * attention + 3 * d * 56 + 2 * experts + 96 * d
    assert flops.active_matmul_parameters(model) == matmul
    expected = 6 * matmul + 6 * layers * heads * (nope + rope + value) * length
    assert flops.flops_per_token(model, length) == expected
    queries = ["q_proj"] if q_rank is None else ["q_a_proj", "q_b_proj"]
    found = {site.site_name.rpartition(".")[2] for site in Sites(model).select() if ".self_attn." in site.site_name}
    assert found == {*queries, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}

    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)) / 8)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    ids = torch.zeros(2, length, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    inv_freq = 2 * 2 * (rope // 2) * length
    assert 3 * (counter.get_total_flops() - inv_freq) == pytest.approx(expected * ids.numel(), rel=2e-3)


def test_count_equals_what_torch_counts_forward():
    """An independent count: torch's own flop counter over a real forward, times 3 for backward."""
    from torch.utils.flop_counter import FlopCounterMode

    model = _llama(tie_word_embeddings=True).to_empty(device="cpu")
    model.set_attn_implementation("eager")
    ids = torch.zeros(2, 16, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    inv_freq = 2 * 2 * (10 // 2) * 16  # rotary angles are an outer product written as a matmul
    counted = 3 * (counter.get_total_flops() - inv_freq)
    assert counted == pytest.approx(flops.flops_per_token(model, 16) * ids.numel(), rel=2e-3)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_further_tokens_are_counted_as_torch_counts_them(family):
    """Torch's count of a training forward, whose heads, one a predicted token, are an operation it does not know."""
    from torch.utils.flop_counter import FlopCounterMode

    from leanmill.architecture.multi_token.around import FurtherTokens
    from leanmill.trainer.train_module import TrainModule
    from tests.core.tiny import VOCAB_SIZE, install, tiny, tokens

    depth, ids, counted = 2, tokens(2, 16), []
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(16).expand(2, -1)}
    for techniques in ([], [{"type": "multi_token", "depth": depth}]):
        model = tiny(family)
        install(model, *techniques)
        for module in model.modules():
            if isinstance(module, FurtherTokens):
                module.to_empty(device="cpu")
        model.set_experts_implementation("eager")
        module = TrainModule(model).train()
        for around in (one for one in model.modules() if isinstance(one, FurtherTokens)):
            around.stream.see_batch(batch)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(batch)
        counted.append(3 * counter.get_total_flops() / ids.numel())
    model = tiny(family)
    told = flops.flops_per_token(model, 16, further_tokens=depth) - flops.flops_per_token(model, 16)
    assert counted[1] - counted[0] + depth * 6 * VOCAB_SIZE * 32 == pytest.approx(told, rel=2e-3)


def test_stages_do_not_change_the_count():
    from leanmill.core.sites import Sites
    from leanmill.core.stage import Slot, Stage

    class Extra(Stage):
        slot, technique = Slot.DELTA, "extra"

        def __init__(self, shape):
            super().__init__()
            self.big = nn.Parameter(torch.empty(shape, device="meta"))

        def forward(self, weight):
            return weight + self.big

    model = _llama()
    before = flops.flops_per_token(model, 8)
    for site in Sites(model).select():
        site.put(Extra(site.raw_weight.shape))
    assert flops.flops_per_token(model, 8) == before


def test_mfu_is_useful_flops_over_peak():
    assert flops.mfu(100.0, 2e9, 1e12) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 3060", None),
    ],
)
def test_known_devices_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert flops.peak_flops_per_second(torch.device("cuda", 0), "bf16") == peak


def test_cpu_peak_is_measured_once_and_keeps_the_random_state():
    flops.measured_matmul_flops.cache_clear()
    state = torch.get_rng_state()
    first = flops.peak_flops_per_second(torch.device("cpu"), "fp32")
    assert 1e8 < first < 1e14
    assert flops.peak_flops_per_second(torch.device("cpu"), "fp32") == first
    assert torch.equal(torch.get_rng_state(), state)
