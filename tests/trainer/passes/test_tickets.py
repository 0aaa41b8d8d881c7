"""The study of a ticket's layers against losses of models that are changed by hand, and the command."""

import copy

import pytest
import torch
import yaml
from torch.nn import functional as F

from leanmill.cli.main import main
from leanmill.core.errors import ConfigError
from leanmill.parallel.launch import Ranks
from leanmill.recipe.compress import CalibratedRecipe
from leanmill.trainer.passes.tickets import study_ticket
from tests.sparse.minitron.test_minitron import rows_of, save
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


ONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture
def ticket(text, tokenizer, tmp_path):  # noqa: F811
    early = save(tmp_path / "early", tokenizer, dtype=torch.float32, num_hidden_layers=2)
    late = copy.deepcopy(early)
    with torch.no_grad():
        for name, parameter in late.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
            if "_proj" in name:
                parameter.mul_(torch.rand_like(parameter) < 0.4)
    late.save_pretrained(tmp_path / "late")
    tokenizer.save_pretrained(tmp_path / "late")
    raw = recipe(tmp_path / "late", text, tmp_path, {"type": "magnitude", "sparsity": 0.5}).model_dump(mode="json")
    del raw["passes"]
    return early, late, CalibratedRecipe.model_validate(raw)


def loss_of(model, rows):
    with torch.no_grad():
        logits = model(**rows, use_cache=False).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), rows["input_ids"][:, 1:].flatten()))


def test_losses_are_those_of_models_changed_by_hand(ticket, tokenizer, tmp_path):  # noqa: F811
    early, late, config = ticket
    rows = rows_of(config, tokenizer)
    study = study_ticket(config, ONE, earlier=tmp_path / "early", by="block")
    assert study.loss == pytest.approx(loss_of(late, rows), abs=1e-5)
    assert [layer.name for layer in study.layers] == ["model.layers.0", "model.layers.1"]
    changed = copy.deepcopy(late)
    for name, parameter in changed.model.layers[1].named_parameters():
        if "_proj" in name:
            parameter.data = early.model.layers[1].get_parameter(name).data * (parameter.data != 0)
    layer = study.layers[1]
    assert layer.rises["early"] == pytest.approx(loss_of(changed, rows) - study.loss, abs=1e-5)
    assert set(layer.rises) == {"early", "drawn", "shuffled"}
    assert all(abs(rise) > 1e-4 for rise in layer.rises.values())
    assert layer.zero_fraction == pytest.approx(0.6, abs=0.02)


def test_the_command_prints_a_line_a_layer(ticket, tmp_path, capsys):
    file = tmp_path / "ticket.yaml"
    file.write_text(yaml.safe_dump(ticket[2].model_dump(mode="json")))
    assert main(["ticket", str(file), "--by", "layer"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["layer", "zeros", "drawn", "shuffled"]
    assert len(lines) == 2 + 2 * 7
    assert main(["ticket", str(file), "--earlier", str(tmp_path / "nowhere")]) == 2
    assert "is no model folder" in capsys.readouterr().err


def test_an_earlier_model_of_another_shape_is_refused(ticket, tokenizer, tmp_path):  # noqa: F811
    save(tmp_path / "other", tokenizer, dtype=torch.float32, intermediate_size=24, num_hidden_layers=2)
    with pytest.raises(ConfigError, match=r"has a \[24, 48\] as .*0.mlp.gate_proj.weight, which is \[56, 48\]"):
        study_ticket(ticket[2], ONE, earlier=tmp_path / "other", by="block")
