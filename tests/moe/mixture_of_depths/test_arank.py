"""The rank of attention maps, and the command that prints it."""

from __future__ import annotations

import re

import pytest
import torch
import yaml

from leanmill.cli.main import main
from leanmill.moe.mixture_of_depths.arank import attention_ranks, lowest
from tests.trainer.passes.test_run import recipe, save_model, text, tokenizer  # noqa: F401


def test_the_rank_of_a_map_is_that_of_what_it_mixes_from_other_tokens():
    row = torch.rand(7)
    same = (row.expand(7, 7)).tril()  # every token mixes the earlier ones alike
    by_hand = [int(torch.linalg.matrix_rank(m.double().tril(-1))) for m in (torch.eye(7), same)]
    assert attention_ranks(torch.stack([torch.eye(7), same])).tolist() == by_hand == [0, 6]
    twice = torch.zeros(8, 8)
    twice[3:, :2] = torch.rand(1, 2)
    assert attention_ranks(twice[None, None]).tolist() == [[1]]
    assert lowest([5.0, 1.0, 3.0, 1.0], 2) == [1, 3]
    assert lowest([2.0, 2.0, 2.0], 1) == [2]


def test_the_command_prints_what_the_model_computes(text, tokenizer, tmp_path, capsys):  # noqa: F811
    model = save_model(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    raw = recipe(tmp_path / "in", text, tmp_path, {"type": "magnitude", "sparsity": 0.5}).model_dump(mode="json")
    del raw["passes"]
    file = tmp_path / "arank.yaml"
    file.write_text(yaml.safe_dump(raw))
    assert main(["arank", str(file), "--num-layers", "2"]) == 0
    out = capsys.readouterr().out
    found = [float(value) for value in re.findall(r"^ +\d+  ([\d.]+)$", out, re.M)]
    from leanmill.data.build import build_train_data
    from leanmill.recipe.compress import CalibratedRecipe

    data = CalibratedRecipe.model_validate(raw).data
    rows = build_train_data(data, tokenizer, seed=0).next_rows(8, rank=0, world_size=1)
    model.set_attn_implementation("eager")
    inputs = {name: rows[name] for name in ("input_ids", "position_ids")}
    maps = model.eval()(**inputs, output_attentions=True, use_cache=False).attentions
    expected = [torch.linalg.matrix_rank(layer.detach().tril(-1)).float().mean().item() for layer in maps]
    assert found == pytest.approx(expected, abs=0.06)
    assert f"layers: {lowest(found, 2)}" in out
    assert main(["arank", str(file), "--num-layers", "9"]) == 2
    assert "more than the 3 layers" in capsys.readouterr().err
