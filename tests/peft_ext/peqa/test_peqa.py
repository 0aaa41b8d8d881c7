"""Integers under trained scales: by the definition, in runs, and from task to task."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from leanmill.checkpoint.reading import read_full_state
from leanmill.core.errors import ConfigError
from leanmill.core.stage import Slot
from leanmill.export.run import export_model
from leanmill.kernels.packing.op import unpack
from leanmill.peft_ext.peqa.stage import SHARES, TrainedScales
from leanmill.recipe.root import Recipe
from leanmill.trainer.run import run
from tests.core.tiny import install, tiny
from tests.sparse.tiny_runs import LAST, SIZES, recipe, with_text


LEVELS = {2: [-1.5, -0.5, 0.5, 1.5], 3: [*range(-3, 4)], 4: [*range(-7, 8)], 8: [*range(-127, 128)]}


def filled(weight, num_bits, group_size):
    stage = TrainedScales(weight.shape, num_bits, group_size, weight.device)
    kept = stage.empty(weight.device)
    stage.assign_encoded(kept, weight, lambda target, value: target.detach().copy_(value))
    return kept, stage


@pytest.mark.parametrize("num_bits", LEVELS)
@pytest.mark.parametrize(("shape", "group_size"), [((3, 10), 10), ((2, 5, 21), 7), ((4, 6), 1)])
def test_a_group_is_rounded_with_least_squared_error(num_bits, shape, group_size):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight.view(-1, shape[-1])[0] = 0
    kept, stage = filled(weight, num_bits, group_size)
    levels = torch.tensor(LEVELS[num_bits], dtype=torch.float32)
    expected = torch.empty_like(weight).view(-1, group_size)
    for index, group in enumerate(weight.view(-1, group_size)):
        errors = []
        for share in torch.linspace(1.0, 0.2, SHARES):
            scale = share * group.abs().max() / levels.max()
            nearest = scale * levels[(group[:, None] - scale * levels).abs().argmin(1)]
            errors.append(((nearest - group).square().sum().item(), nearest))
        expected[index] = min(errors, key=lambda pair: pair[0])[1]
    got = stage(kept).detach()
    error, least = ((w - weight).square().view(-1, group_size).sum(1) for w in (got, expected.view(shape)))
    torch.testing.assert_close(error, least, rtol=1e-4, atol=1e-6)
    allowed = stage.scale.detach().view(-1, 1) * levels
    assert (got.view(-1, group_size)[:, :, None] - allowed[:, None]).abs().amin(-1).max() < 1e-6


def _write_codes(file):
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((512, 2048), dtype=np.float32))
    torch.save(TrainedScales(weight.shape, 4, 2048, weight.device).encode(weight), file)


@pytest.mark.slow
def test_every_processor_chooses_the_same_integers(tmp_path):
    """Checkpoints hold scales alone, so a resume elsewhere must make the integers that were under them."""
    found = []
    for capability in ("default", "avx2"):
        file = tmp_path / f"{capability}.pt"
        call = f"from tests.peft_ext.peqa.test_peqa import _write_codes; _write_codes({str(file)!r})"
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        subprocess.run([sys.executable, "-c", call], check=True, env=environment, cwd=Path(__file__).parents[3])
        found.append(torch.load(file))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_bits", [2, 4])
def test_the_gradient_is_that_of_the_scale(num_bits, dtype):
    torch.manual_seed(1)
    weight, outer = torch.randn(3, 5, 12), torch.randn(3, 5, 12)
    kept, stage = filled(weight, num_bits, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        (stage(kept).to(dtype) * outer.to(dtype)).sum().backward()
    integers = (unpack(kept, stage.encoding, 12).float() - stage.zero).view(3, 5, 3, 4)
    expected = (outer.to(dtype).float().view(3, 5, 3, 4) * integers).sum(-1)
    torch.testing.assert_close(stage.scale.grad, expected)
    assert kept.dtype == torch.uint8
    assert kept.shape == (3, 5, 3 if num_bits == 2 else 6)


def test_no_group_is_of_two_rows_and_scales_alone_train():
    model = tiny()
    install(model, {"type": "peqa", "bits": 3, "group_size": 16, "targets": ["q_proj", "down_proj"]})
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"model.layers.{n}.{name}.stages.compact.scale": shape
        for n in range(2)
        for name, shape in (("self_attn.q_proj", (32, 2)), ("mlp.down_proj", (32, 3)))
    }
    site = model.model.layers[0].mlp.down_proj
    assert site.weight.dtype == torch.uint8
    assert isinstance(site.stage(Slot.COMPACT), TrainedScales)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([{"group_size": 5}], "set group_size: 4 or 8"),
        ([{"targets": ["embed_tokens"]}], "no tables"),
        ([{}, {"type": "ternary"}], "'ternary' would round it again"),
    ],
)
def test_what_does_not_fit_is_refused(given, match):
    first, *others = given
    with pytest.raises(ConfigError, match=match):
        install(tiny(), {"type": "peqa", **first}, *others)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = with_text(tmp_path_factory.mktemp("peqa"))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "model")
    for name, seed in (("one", 0), ("other", 1)):
        run(task(folder, name, seed))
    return folder


def task(folder, name, seed):
    technique = {"type": "peqa", "bits": 4, "group_size": 8, "lr_factor": 0.1}
    given = recipe(folder, name, technique).model_dump()
    given |= {"model": {"path": str(folder / "model")}, "seed": seed}
    return Recipe.model_validate(given)


def test_a_checkpoint_holds_scales_and_a_resume_is_bitwise(folder):
    whole = {part: read_full_state(folder / "one" / LAST, part) for part in ("model", "optimizer")}
    assert len(whole["model"]) == 7
    assert all(name.endswith(".stages.compact.scale") for name in whole["model"])
    shutil.copytree(folder / "one", folder / "again")
    for later in range(5, 9):
        shutil.rmtree(folder / f"again/checkpoints/step-{later:08d}")
    assert run(task(folder, "again", 0)).step == 8
    for part, state in whole.items():
        got = read_full_state(folder / "again" / LAST, part)
        assert got.keys() == state.keys()
        assert all(torch.equal(got[name], value) for name, value in state.items())


def test_tasks_differ_by_scales_over_the_same_integers(folder):
    for name in ("one", "other"):
        export_model(folder / name / LAST, folder / f"{name}-packed", to="packed")
        export_model(folder / name / LAST, folder / f"{name}-plain")
    one, other = (load_file(folder / f"{name}-packed/packed.safetensors") for name in ("one", "other"))
    packed = [name for name in one if name.endswith(".packed")]
    assert len(packed) == 7
    for name in packed:
        assert torch.equal(one[name], other[name])
        scales = name.replace(".packed", ".scales")
        assert not torch.equal(one[scales], other[scales])
    trained = read_full_state(folder / "one" / LAST)
    name = "model.layers.0.mlp.up_proj"
    integers = unpack(one[f"{name}.packed"], 4, 16).float() - 8
    scale = trained[f"{name}.stages.compact.scale"]
    plain = load_file(folder / "one-plain/model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(plain, (integers.view(32, 2, 8) * scale[..., None]).view(32, 16), rtol=1e-6, atol=0)
