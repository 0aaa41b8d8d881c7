"""Bits by layer, phases of bits, and Double Rounding's widths from one store, against what they are to be."""

import json
from types import SimpleNamespace

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.rules import StepContext
from leanmill.core.sites import iter_sites
from leanmill.export import export_model, load_packed
from leanmill.export.widths import switch_widths
from leanmill.quant.int_quant.stage import IntWeights
from tests.core.tiny import install, tiny
from tests.export.checkpoints import checkpoint_of


def context(step, num_steps=10, views=None):
    return StepContext(step=step, num_steps=num_steps, num_micro_batches=1, views=views)


def bits_of(model):
    return {name: site.stages["quant"].grid.num_bits for name, site in iter_sites(model)}


@pytest.mark.parametrize("kind", ["int_quant", "lsq"])
def test_the_last_pattern_that_matches_counts(kind):
    model = tiny()
    by_pattern = {"layers.1.*": 3, "layers.1.mlp.*": 8, "*.up_proj": 2}
    install(model, {"type": kind, "weight_bits": 4, "bits_per_layer": by_pattern})
    for name, bits in bits_of(model).items():
        expected = 2 if name.endswith("up_proj") else 4 if ".layers.0" in name else 8 if ".mlp." in name else 3
        assert bits == expected, name


def test_maps_that_do_not_fit():
    for raw, match in [
        ({"bits_per_layer": {"q_prj": 4}}, "near names: .*q_proj"),
        ({"bits_per_layer": {"embed_tokens": 4}, "targets": ["*_proj"]}, "matches no weight that int_quant takes"),
    ]:
        with pytest.raises(ConfigError, match=match):
            install(tiny(), {"type": "int_quant", **raw})
    tied = {"targets": ["embed_tokens", "lm_head"], "bits_per_layer": {"lm_head": 8}}
    with pytest.raises(ConfigError, match="both are one weight"):
        install(tiny("llama", tie_word_embeddings=True), {"type": "int_quant", **tied})
    for raw, match in [
        ({"type": "int_quant", "bits_per_layer": {"q_proj": 9}}, "type 2 to 8"),
        ({"type": "int_quant", "bits_per_layer": {"q_proj": 1}}, "int_quant.exclude"),
        ({"type": "lsq", "bits_per_layer": {"q_proj": 1}}, "type 2 to 8"),
    ]:
        with pytest.raises(ValueError, match=match):
            parse_technique(raw)
    parse_technique({"type": "lsq", "grid": "midrise", "bits_per_layer": {"q_proj": 1}})


def test_phases_end_at_the_weights_own_bits():
    raw = {
        "type": "int_quant",
        "weight_bits": 2,
        "bits_per_layer": {"up_proj": 4},
        "bits_schedule": [{"bits": 8, "until": 0.3}, {"bits": 3, "until": 0.6}],
    }
    model = tiny()
    (rule,) = install(model, raw).step_rules
    for step, (least, least_of_up) in enumerate([(8, 8)] * 3 + [(3, 4)] * 3 + [(2, 4)] * 4):
        rule.begin_step(context(step))
        for name, bits in bits_of(model).items():
            assert bits == (least_of_up if name.endswith("up_proj") else least), (step, name)
    again = tiny()
    (resumed,) = install(again, json.loads(parse_technique(raw).model_dump_json())).step_rules
    resumed.begin_step(context(4))
    assert set(bits_of(again).values()) == {3, 4}, "a resumed run stands where it stood"


def test_schedules_that_do_not_fit():
    def problems(*phases, num_steps=10, **raw):
        schedule = [{"bits": bits, "until": until} for bits, until in phases]
        config = parse_technique({"type": "int_quant", "bits_schedule": schedule, **raw})
        return " ".join(config.problems_in_a_run_of(num_steps))

    assert not problems((8, 0.3), (4, 0.6), weight_bits=2)
    assert not problems((8, 3), (5, 0.6)), "steps and shares may be mixed"
    assert "ascending" in problems((8, 0.6), (5, 3))
    assert "no step would train" in problems((8, 10))
    assert "12 steps" not in problems((8, 9), num_steps=12)
    assert "never trained" in problems(switch_bits=[8, 6, 4, 2], num_steps=3)
    for raw, match in [
        ({"bits_schedule": [{"bits": 8, "until": 1.5}]}, "until: 2 for steps"),
        ({"bits_schedule": [{"bits": 16, "until": 0.5}]}, "less than or equal to 8"),
        ({"bits_schedule": [{"bits": 4, "until": 0.5}]}, "all above 4"),
        ({"bits_schedule": [{"bits": 6, "until": 0.2}, {"bits": 8, "until": 0.5}]}, "do not fall"),
        ({"switch_bits": [4]}, "two or more different"),
        ({"switch_bits": [8, 16], "weight_bits": 8}, "from 2 to 8"),
        ({"switch_bits": [8, 6], "weight_bits": 4}, "set weight_bits: 6"),
        ({"switch_bits": [8, 4], "bits_per_layer": {"q_proj": 4}}, "take turns"),
    ]:
        with pytest.raises(ValueError, match=match):
            parse_technique({"type": "int_quant", **raw})


def double_rounding(weight, scale, bits):
    """Huang et al. 2025: int8 codes, and lower ones rounded from those."""
    stored = (weight / scale).round().clamp(-127, 127)
    most = 2 ** (bits - 1) - 1
    return (stored / 2 ** (8 - bits)).round().clamp(-most, most), scale * 2 ** (8 - bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("granularity", "group_size"), [("tensor", None), ("row", None), ("group", 6)])
@pytest.mark.parametrize("bits", [8, 6, 4, 2])
def test_lower_widths_are_rounded_from_the_store(bits, granularity, group_size, dtype):
    weight, upstream = torch.randn(7, 18).to(dtype).requires_grad_(), torch.randn(7, 18).to(dtype)
    stage = IntWeights(8, "absmax", granularity, group_size, widths=[8, 6, 4, 2])
    stage.switch_to(bits)
    out = stage(weight)
    out.backward(upstream)
    groups = weight.detach().float().reshape(7, -1, group_size or 18)
    dims = (0, 1, 2) if granularity == "tensor" else (2,)
    codes, scale = double_rounding(groups, groups.abs().amax(dims, keepdim=True) / 127, bits)
    assert torch.equal(out, (codes * scale).reshape(7, 18).to(dtype))
    assert torch.equal(weight.grad, upstream)
    packed = stage.codes(weight.detach())
    values = packed.values.float().unflatten(-1, (packed.scales.shape[-1], -1)) - packed.zero
    if bits == 2:  # codes -1, 0, 1 are ternary
        assert packed.encoding == "ternary"
    assert torch.equal(values.reshape(7, -1), codes.reshape(7, -1)), "codes are exact, ties too"
    torch.testing.assert_close((values * packed.scales.unsqueeze(-1)).reshape(7, 18).to(dtype), out.detach())


def test_steps_take_turns_and_evaluations_have_the_recipes_width():
    model = tiny()
    (rule,) = install(model, {"type": "int_quant", "weight_bits": 4, "switch_bits": [8, 4, 2]}).step_rules
    views = SimpleNamespace()  # of a run that trains
    for step, bits in enumerate([8, 4, 2, 8]):
        rule.begin_step(context(step, views=views))
        assert set(bits_of(model).values()) == {bits}
        rule.after_optimizer(context(step, views=views))
        assert set(bits_of(model).values()) == {4}
    rule.begin_step(context(2))
    assert set(bits_of(model).values()) == {4}, "nothing trains in an export"


def test_one_checkpoint_gives_every_width(tmp_path):
    raw = {"type": "int_quant", "weight_bits": 8, "switch_bits": [8, 4, 2]}
    trained, checkpoint = checkpoint_of(tmp_path / "run", "llama", [raw])
    for bits, packing in ((8, "int8"), (2, "ternary")):
        export_model(checkpoint, tmp_path / packing, to="hf", packing=packing, num_bits=bits)
        layer = load_packed(tmp_path / packing).get_submodule("model.layers.0.mlp.up_proj")
        switch_widths(trained, bits)
        weight = trained.get_submodule("model.layers.0.mlp.up_proj").effective_weight()
        torch.testing.assert_close(layer.weight_values(), weight.detach(), rtol=1e-6, atol=1e-7)
    with pytest.raises(ConfigError, match="widths 8, 4, 2"):
        switch_widths(trained, 3)
    with pytest.raises(ConfigError, match="leave it out"):
        switch_widths(tiny(), 4)
