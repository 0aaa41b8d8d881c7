"""Models of every kind through the tasks that need nothing but this machine."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import leanmill
from leanmill.cli.main import main
from leanmill.core.errors import ConfigError
from leanmill.data.build import build_tokenizer
from leanmill.evaluate.run import evaluate_models
from leanmill.export import export_model
from leanmill.models.offloading import Held
from leanmill.models.pretrained import load_frozen
from leanmill.recipe.evaluate import EvaluateRecipe
from leanmill.trainer.evaluate_checkpoint import evaluate_folder
from tests.export.checkpoints import checkpoint_of


BITS = {"type": "bits_per_byte", "tokens_per_domain": 256}
RETRIEVAL = {"type": "retrieval", "lengths": [192], "num_texts": 2}


def data_of(folder):
    """Two domains of text."""
    sources = []
    for name, word in (("left", "some words"), ("right", "other words")):
        path = folder / f"{name}.jsonl"
        if not path.exists():
            lines = [{"text": f"line {i} of {word} {i * i}\n" * 6} for i in range(120)]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        sources.append({"type": "hf", "name": name, "path": str(path), "validation_fraction": 0.2})
    return {
        "source": {"type": "mixture", "sources": sources},
        "tokenizer": {"vocab_size": 300},
        "sequence_length": 32,
        "cache_dir": str(folder / "cache"),
    }


def recipe(folder, tasks):
    raw = {"device": "cpu", "data": data_of(folder), "tasks": tasks, "rows_per_batch": 4}
    return EvaluateRecipe.model_validate(raw)


def model_folder(path, folder):
    raw = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    raw |= {"num_key_value_heads": 1, "max_position_embeddings": 256, "vocab_size": 300, "tie_word_embeddings": True}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **raw)).save_pretrained(path)
    build_tokenizer(recipe(folder, [BITS]).data).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    model_folder(folder / "dense", folder)
    pruned = AutoModelForCausalLM.from_pretrained(folder / "dense")
    with torch.no_grad():
        for layer in pruned.model.layers:
            layer.mlp.down_proj.weight.mul_(torch.rand_like(layer.mlp.down_proj.weight) < 0.1).mul_(40)
    pruned.save_pretrained(folder / "pruned")
    build_tokenizer(recipe(folder, [BITS]).data).save_pretrained(folder / "pruned")
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_a_model_of_which_a_part_is_held_has_the_scores_of_the_whole(files, tmp_path, capsys, dtype):
    folder = tmp_path / "stored"
    AutoModelForCausalLM.from_pretrained(files / "dense", dtype=dtype).save_pretrained(folder)
    build_tokenizer(recipe(files, [BITS]).data).save_pretrained(folder)
    whole, part = (
        evaluate_models(recipe(files, [BITS, RETRIEVAL]).model_copy(update={"weights_gib": gib}), [folder]).scores[
            folder
        ]
        for gib in (None, 3e-5)  # 32 KB: the embedding does not fit beside a layer
    )
    # Logits as a whole, where the whole model has its loss in the head: other sums.
    assert {one.key: one.value for one in part} == pytest.approx({one.key: one.value for one in whole}, rel=1e-6)
    data = [f"data.{key}={json.dumps(value)}" for key, value in data_of(files).items()]
    data += ["eval.tokens_per_domain=256", "train.precision=fp32", "device=cpu"]
    alone, half = (evaluate_folder(folder, data, weights_gib=gib) for gib in (None, 3e-5))
    assert {n: s.loss for n, s in half.scores.items()} == pytest.approx({n: s.loss for n, s in alone.scores.items()})
    asked = ["generate", "--model", str(folder), "--prompt", "some words", "--max-new-tokens", "6", "--json"]
    texts = []
    for more in ([], ["--weights-gib", "3e-5"]):
        assert main([*asked, *more]) == 0
        texts.append(json.loads(capsys.readouterr().out)["as exported"]["text"])
    assert texts[0] == texts[1]
    held = Held(3e-5, torch.device("cpu"))
    offloaded, ids = load_frozen(str(folder), held=held), torch.arange(24)[None]
    assert torch.equal(offloaded(ids).logits, load_frozen(str(folder))(ids).logits)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    with pytest.raises(ConfigError, match="device_map, which is for reading alone"):
        leanmill.attach(offloaded, [{"type": "ternary"}])


def test_text_is_scored_as_eval_scores_it_and_held_against_the_dense_model(files):
    found = evaluate_models(recipe(files, [BITS, RETRIEVAL]), [files / "pruned"], dense=files / "dense", bound=0.01)
    data = [f"data.{key}={json.dumps(value)}" for key, value in data_of(files).items()]
    for name in ("dense", "pruned"):
        alone = evaluate_folder(files / name, [*data, "eval.tokens_per_domain=256", "train.precision=fp32"])
        bits = {s.group: s.value for s in found.scores[files / name] if s.task == "bits_per_byte"}
        assert bits == pytest.approx({key: one.bits_per_byte for key, one in alone.scores.items()})
        assert list(bits) == ["left", "right", "all"]
    lost = {one.score.key: one.loss for one in found.lost(files / "pruned")}
    dense, pruned = ({s.key: s.value for s in found.scores[files / name]} for name in ("dense", "pruned"))
    key = ("bits_per_byte", "left", "bits/byte")
    assert lost[key] == pytest.approx(pruned[key] / dense[key] - 1)
    assert not any(one.loss for one in found.lost(files / "dense"))
    assert ("retrieval", "192 tokens", "accuracy") in lost


def test_the_command_prints_one_table_and_its_status_is_the_bound(files, tmp_path, capsys):
    data = f"data={json.dumps(data_of(files))}"
    tasks = f"tasks=[{json.dumps(BITS)}]"
    models = ["--dense", str(files / "dense"), "--model", str(files / "pruned")]
    out = tmp_path / "found.json"
    assert main(["evaluate", *models, "--bound", "0", "--out", str(out), "device=cpu", data, tasks]) == 1
    table = capsys.readouterr().out
    for part in ("dense:", "model 1:", "lost", "left", "right", "all", "model 1 lost more than 0.0 in"):
        assert part in table
    written = json.loads(out.read_text())
    assert written["beyond_bound"][str(files / "pruned")]
    assert main(["evaluate", *models, "--bound", "1", "--json", "device=cpu", data, tasks]) == 0
    assert json.loads(capsys.readouterr().out)["lost"] == written["lost"]
    assert main(["evaluate", *models, "--out", str(tmp_path / "no" / "file"), "device=cpu", data, tasks]) == 2
    assert main(["evaluate", *models, "device=cpu", data, tasks, "tasks.0.type=bits"]) == 2
    assert main(["evaluate"]) == 2


def test_a_run_its_export_and_its_packed_export_score_alike(files, tmp_path):
    technique = {"type": "int_quant", "weight_bits": 4, "targets": ["*_proj", "embed_tokens", "lm_head"]}
    checkpoint = checkpoint_of(tmp_path / "run", "llama", [technique], vocab_size=300, max_position_embeddings=256)[1]
    build_tokenizer(recipe(files, [BITS]).data).save_pretrained(tmp_path / "run/tokenizer")
    export_model(checkpoint, tmp_path / "plain")
    export_model(checkpoint, tmp_path / "packed", packing="int4")
    paths = [checkpoint, tmp_path / "plain", tmp_path / "packed"]
    found = evaluate_models(recipe(files, [BITS, RETRIEVAL]), paths)
    run, plain, packed = ({s.key: s.value for s in found.scores[path]} for path in paths)
    assert plain == pytest.approx(run, rel=1e-4)
    assert packed == pytest.approx(run, rel=1e-4)


def test_requests_that_do_not_fit(files):
    with pytest.raises(ConfigError, match="name it with --dense"):
        evaluate_models(recipe(files, [BITS]), [files / "dense"], bound=0.1)
    long = recipe(files, [BITS]).data.model_copy(update={"sequence_length": 512})
    with pytest.raises(ConfigError, match="type data.sequence_length=256"):
        evaluate_models(recipe(files, [BITS]).model_copy(update={"data": long}), [files / "dense"])
