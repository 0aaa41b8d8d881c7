"""L4Q, which is `lsq` over `lora`: the paper's equations, what is held, and what a served model computes."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from leanmill.core.site import LinearSite
from leanmill.core.sites import iter_sites
from leanmill.export import export_model
from leanmill.export.compare import sample_logits
from leanmill.models.frozen import compact_frozen
from leanmill.models.materialise import make_materialiser
from leanmill.peft_ext.lora.stage import LoraStage
from leanmill.quant.lsq.stage import LsqStage
from leanmill.trainer.rebuild import rebuild
from tests.core.tiny import install, loss_of, tiny, tokens
from tests.export.checkpoints import checkpoint_of, recipe_of


def l4q(bits, group_size=16):
    lsq = {"type": "lsq", "weight_bits": bits, "granularity": "group", "group_size": group_size, "weight_start": "l4q"}
    return [{"type": "lora", "rank": 2}, lsq]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_by_the_equations_of_the_paper(bits, dtype):
    """Eqs. 3 to 15 of arXiv:2402.04902, without its bias b, which is at 0."""
    torch.manual_seed(0)
    weight, group_size, scaling = torch.randn(17, 24), 8, 2.0
    site = LinearSite.adopt(torch.nn.Linear(24, 17, bias=False), "proj")
    site.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    lora, lsq = LoraStage(weight, 3, scaling), LsqStage(weight, bits, "signed", "group", group_size, start="l4q")
    site.put(lora)
    site.put(lsq)
    torch.nn.init.normal_(lora.lora_B, std=0.1)
    lsq.initialise(weight)
    qn, qp = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    groups = weight.view(17, 3, group_size)
    start = torch.maximum((groups.amin(-1) / -qn).abs(), (groups.amax(-1) / qp).abs())
    torch.testing.assert_close(lsq.scale.detach(), start)
    x = torch.randn(5, 24, dtype=dtype, requires_grad=True)
    upstream = torch.randn(5, 17, dtype=dtype)
    site(x).backward(upstream)

    a, b, step = lora.lora_A.detach(), lora.lora_B.detach(), start.unsqueeze(-1)
    w = ((weight + scaling * b @ a).view(17, 3, group_size) / step).detach()
    rounded = w.clamp(-qn, qp).round()
    quantised = (rounded * step).view(17, 24)
    torch.testing.assert_close(site.effective_weight(), quantised, rtol=1e-5, atol=1e-6)
    to_weight = upstream.float().T @ x.detach().float()
    inside = (w > -qn) & (w < qp)
    to_merged = torch.where(inside, to_weight.view_as(w), 0.0).view(17, 24)
    by_step = torch.where(inside, rounded - w, torch.where(w <= -qn, -float(qn), float(qp)))
    to_step = (to_weight.view_as(w) * by_step).sum(-1) / (group_size * qp) ** 0.5
    share = 1e-5 if dtype == torch.float32 else 2e-2
    for got, wanted in (
        (lora.lora_B.grad, scaling * to_merged @ a.T),
        (lora.lora_A.grad, scaling * b.T @ to_merged),
        (lsq.scale.grad, to_step),
        (x.grad.float(), upstream.float() @ quantised),
    ):
        assert (got - wanted).norm() <= share * wanted.norm()


class Peak(TorchDispatchMode):
    """The most bytes that storages made inside the context held at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _free(self, address, size):
        self._known.discard(address)
        self.now -= size


def peak_bytes(*techniques):
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = tiny("llama", **shape)
    install(model, *techniques)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # both have theirs before
    with torch.autocast("cpu", torch.bfloat16), Peak() as peak:
        loss_of(model, tokens(4, 48)).backward()
    return peak.most


def test_it_holds_what_lora_does_and_a_layer():
    lora, with_grid = peak_bytes(l4q(4)[0]), peak_bytes(*l4q(4))
    a_layer = 4 * (4 * 128 * 128 + 3 * 128 * 256)
    assert with_grid <= 1.1 * lora + a_layer


@pytest.mark.parametrize("bits", [3, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 4))])
def test_plain_transformers_computes_what_was_trained(bits, tmp_path):
    pytest.importorskip("compressed_tensors")
    checkpoint = checkpoint_of(tmp_path, "qwen3", l4q(bits), frozen_dtype="bf16")[1]
    report = export_model(checkpoint, tmp_path / "out", packing="compressed_tensors")
    assert report.max_difference <= report.tolerance
    trained = rebuild(checkpoint).model
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected = sample_logits(trained)
    for kind, logits in sample_logits(served).items():
        torch.testing.assert_close(logits, expected[kind], rtol=1e-4, atol=1e-4)
    assert all(
        site.folded_weight()[0].unique().numel() <= 2**bits * 3 for _, site in iter_sites(trained) if site.is_reshaped
    )


def test_steps_start_from_the_stored_weight(tmp_path):
    plain = tiny("llama")
    plain.save_pretrained(tmp_path / "base")
    recipe = recipe_of("llama", l4q(3), path=tmp_path / "base")
    with torch.device("meta"):
        model = tiny("llama")
    install(model, *l4q(3))
    compact_frozen(model, "bf16", "fp32")
    make_materialiser(recipe.model, seed=0)(model)
    for name, site in iter_sites(model):
        if "quant" in site.stages:
            stage = site.stages["quant"]
            groups = plain.get_parameter(f"{name}.weight").bfloat16().float().unflatten(-1, (-1, 16))
            wanted = torch.maximum(-groups.amin(-1) / 4, groups.amax(-1) / 3)
            torch.testing.assert_close(stage.scale.detach(), wanted)
