"""Compression of a model folder: what is written, and that one block is in memory."""

import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.cli.main import main
from leanmill.core.blocks import decoder_blocks
from leanmill.core.errors import ConfigError, RunError
from leanmill.core.transposed import as_linears
from leanmill.recipe.compress import CompressRecipe
from leanmill.trainer.passes.run import compress
from leanmill.trainer.run_lock import exclusive
from tests.distributed import run_ranks


WANDA = {"type": "wanda", "num_kept": 2, "group_size": 4}


def save_model(folder, family="llama", dtype=torch.float32, **changes):
    raw = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    raw |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "vocab_size": 300, "bos_token_id": None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **raw | changes)).to(dtype)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.jsonl"
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "rain",
        "falls",
        "on",
        "old",
        "stones",
        "and",
        "nobody",
        "looks",
        "up",
    ]
    with file.open("w") as out:
        for number in range(400):
            line = " ".join(words[(number * step) % len(words)] for step in range(1, 60))
            out.write(json.dumps({"text": f"{number} {line}"}) + "\n")
    return file


def recipe(folder, text, tmp_path, *passes, **more):
    return CompressRecipe.model_validate(
        {
            "device": "cpu",
            "precision": "fp32",
            "model": {"path": str(folder), "attention": more.pop("attention", "sdpa")},
            "data": {
                "source": {"type": "hf", "path": str(text)},
                "sequence_length": 16,
                "tokenizer": {"vocab_size": 300, "path": None, **more.pop("tokenizer", {})},
                "cache_dir": str(tmp_path / "cache"),
            },
            "calibration": {"num_rows": 8, "rows_per_batch": 4},
            "passes": list(passes),
            **more,
        }
    )


@pytest.fixture
def tokenizer(text, tmp_path):
    """A byte-level tokenizer of 300 tokens, saved where a model's own would be."""
    from leanmill.data.build import build_tokenizer

    data = recipe("unused", text, tmp_path, WANDA).data
    return build_tokenizer(data)


def inputs_of(model, rows):
    """Inputs of every linear layer when the rows go through, by name."""
    seen = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0].detach()))
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(input_ids=rows["input_ids"], position_ids=rows["position_ids"], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat([x.flatten(0, -2) for x in xs]) for name, xs in seen.items()}


def test_calibration_rows_pass_without_dropout(text, tokenizer, tmp_path):
    found = []
    for share in (0.0, 0.5):
        folder = tmp_path / f"in-{share}"
        save_model(folder, attention_dropout=share)
        tokenizer.save_pretrained(folder)
        compress(recipe(folder, text, tmp_path, WANDA), tmp_path / f"out-{share}")
        found.append(AutoModelForCausalLM.from_pretrained(tmp_path / f"out-{share}").state_dict())
    for name, weight in found[0].items():
        assert torch.equal(found[1][name], weight), name


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_wanda_equals_the_formula_block_after_block(family, text, tokenizer, tmp_path):
    """Masks come from inputs that pruned earlier blocks made, as in the paper's code."""
    model = as_linears(save_model(tmp_path / "in", family, head_dim=16)).eval()
    tokenizer.save_pretrained(tmp_path / "in")
    attention = "eager" if family == "gemma2" else "sdpa"
    config = recipe(tmp_path / "in", text, tmp_path, WANDA, attention=attention)
    reports = compress(config, tmp_path / "out")
    names = {id(module): name for name, module in model.named_modules()}
    blocks = [names[id(block)] for block in decoder_blocks(model)]
    assert len(reports) == sum(isinstance(m, torch.nn.Linear) for m in model.modules()) - 1
    assert all(abs(report.zero_fraction - 0.5) < 1e-6 for report in reports)
    from leanmill.data.build import build_train_data

    rows = build_train_data(config.data, tokenizer, seed=0).next_rows(8)
    for block in blocks:
        seen = inputs_of(model, rows)
        for name, layer in model.named_modules():
            if name.startswith(f"{block}.") and isinstance(layer, torch.nn.Linear):
                score = (layer.weight.abs() * seen[name].square().sum(0).sqrt()).detach().reshape(-1, 4)
                mask = score >= score.topk(2, dim=-1).values[:, 1:]
                with torch.no_grad():
                    layer.weight.mul_(mask.view_as(layer.weight))
    got = as_linears(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    for (name, p), q in zip(model.named_parameters(), got.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "config",
    [
        {"type": "magnitude", "sparsity": 0.5},
        {"type": "sparsegpt", "num_kept": 2, "group_size": 4},
        {"type": "gptq", "weight_bits": 3, "group_size": 16},
    ],
    ids=lambda config: config["type"],
)
def test_what_is_written_loads_and_nothing_else_changes(config, text, tokenizer, tmp_path):
    before = save_model(tmp_path / "in", dtype=torch.bfloat16, tie_word_embeddings=True)
    tokenizer.save_pretrained(tmp_path / "in")
    compress(recipe(tmp_path / "in", text, tmp_path, config), tmp_path / "out")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    old = dict(before.named_parameters())
    for name, p in after.named_parameters():
        assert p.dtype == torch.bfloat16
        is_solved = "_proj" in name
        assert torch.equal(p, old[name]) is not is_solved, name
        if is_solved and config["type"] != "gptq":
            assert (p == 0).float().mean() == pytest.approx(0.5, abs=0.02), name
        if is_solved and config["type"] == "gptq":
            assert all(len(group.unique()) <= 7 for group in p.reshape(-1, 16)), name
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "out" / "leanmill.json").read_text())["passes"][0]["type"] == config["type"]
    assert not list(tmp_path.glob(".out*"))


def test_passes_run_one_after_another_and_keep_the_mask(text, tokenizer, tmp_path):
    save_model(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    passes = (WANDA, {"type": "gptq", "weight_bits": 4, "group_size": None, "targets": ["mlp.*"]})
    compress(recipe(tmp_path / "in", text, tmp_path, *passes), tmp_path / "out")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {path.name.split("-")[0] for path in (tmp_path / "out").iterdir() if path.suffix == ".safetensors"} == {
        "model"
    }
    weight = after.model.layers[1].self_attn.q_proj.weight
    assert ((weight.reshape(-1, 4) == 0).sum(-1) == 2).all()
    assert all(len(row.unique()) <= 15 for row in after.model.layers[1].mlp.up_proj.weight)


def _two(config, out):
    compress(config, out)
    return dist.is_initialized()


def test_two_ranks_see_what_one_process_sees(text, tokenizer, tmp_path, monkeypatch):
    save_model(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    config = recipe(tmp_path / "in", text, tmp_path, {"type": "sparsegpt", "num_kept": 2, "group_size": 4})
    compress(config, tmp_path / "one")
    run_ranks(_two, 2, config, tmp_path / "two")
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    for (name, p), q in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert (p - q[1]).norm() <= 1e-3 * p.norm(), name


def test_one_command_at_a_time_writes_a_folder(text, tmp_path):
    asked = recipe(tmp_path / "in", text, tmp_path, WANDA)
    said = r"out is being written by another command: .* is in use"
    with exclusive(tmp_path / ".out.lock", 0), pytest.raises(ConfigError, match=said):
        compress(asked, tmp_path / "out")
    with pytest.raises(ConfigError, match="in"):  # no such model: the lock is not what is in the way
        compress(asked, tmp_path / "out")
    assert not (tmp_path / ".out.lock").exists()


def test_requests_that_do_not_fit(text, tokenizer, tmp_path):
    save_model(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    with pytest.raises(ConfigError, match="group_size 64 does not divide"):
        compress(recipe(tmp_path / "in", text, tmp_path, {"type": "gptq", "group_size": 64}), tmp_path / "out")
    with pytest.raises(ConfigError, match="matches no linear layer"):
        compress(recipe(tmp_path / "in", text, tmp_path, WANDA | {"targets": ["nope"]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_model(tmp_path / "moe", "phimoe", num_local_experts=2)
    tokenizer.save_pretrained(tmp_path / "moe")
    with pytest.raises(ConfigError, match="other names than the modules of phimoe"):
        compress(recipe(tmp_path / "moe", text, tmp_path, WANDA | {"targets": ["self_attn.*"]}), tmp_path / "out")
    for raw, message in [
        ({"type": "wandaa"}, "did you mean wanda"),
        ({"type": "wanda"}, "takes one pattern"),
        ({"type": "wanda", "num_kept": 4, "group_size": 4}, "prunes nothing"),
        ("wanda", "mapping with a `type`"),
    ]:
        with pytest.raises(ValueError, match=message):
            recipe(tmp_path / "in", text, tmp_path, raw)


def test_weights_that_are_no_numbers_are_refused(text, tokenizer, tmp_path):
    model = save_model(tmp_path / "in")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    prune = {"type": "magnitude", "sparsity": 0.5, "targets": ["up_proj"]}
    with pytest.raises(RunError, match=r"layers\.1\.mlp\.up_proj\.weight in .* not finite; give a checkpoint"):
        compress(recipe(tmp_path / "in", text, tmp_path, prune), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line(text, tokenizer, tmp_path, capsys):
    import yaml

    save_model(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    file = tmp_path / "compress.yaml"
    file.write_text(yaml.safe_dump(recipe(tmp_path / "in", text, tmp_path, WANDA).model_dump(mode="json")))
    assert main(["compress", str(file), "--out", str(tmp_path / "out"), "passes.0.num_kept=1"]) == 0
    assert "75.0% zeros" in capsys.readouterr().out
    assert main(["compress", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["compress", str(file), "--out", str(tmp_path / "new"), "calibration.num_row=1"]) == 2
    assert "did you mean 'num_rows'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "one",
    [
        WANDA,
        {"type": "magnitude", "sparsity": 0.5},  # ranks a whole matrix
        {"type": "sparsegpt", "num_kept": 2, "group_size": 4},
        {"type": "gptq", "group_size": None},  # permutes its gram matrices
    ],
    ids=lambda one: one["type"],
)
def test_two_blocks_are_in_memory(one, text, tokenizer, tmp_path):
    """Of a model of 10 blocks, by anonymous memory from where the first block is read until two are written."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10, "num_attention_heads": 16}
    model = save_model(tmp_path / "in", **sizes, num_key_value_heads=4)
    tokenizer.save_pretrained(tmp_path / "in")
    num_block = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    num_bytes = sum(p.numel() * 4 for p in model.parameters())
    del model
    config = recipe(tmp_path / "in", text, tmp_path, one).model_dump_json()
    code = f"""
import itertools, os, re, threading, time
from pathlib import Path
from leanmill.recipe.compress import CompressRecipe
import leanmill.trainer.passes.run as run
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
peak = before = 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)
blocks = run.BlockStream.blocks
def watched(self):
    global before
    before = anonymous()
    threading.Thread(target=watch, daemon=True).start()
    yield from itertools.islice(blocks(self), 2)
    print(peak - before, flush=True)
    os._exit(0)
run.BlockStream.blocks = watched
run.compress(CompressRecipe.model_validate_json({config!r}), Path({str(tmp_path / "out")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr
    used = int(done.stdout.split()[-1])
    activations = 2 * 8 * 16 * 1024 * 4
    print(f"{one['type']}: {used / num_block:.2f} blocks of {num_block / 2**20:.0f} MiB")
    assert used <= 2 * num_block + activations, used / num_block
    assert num_bytes > 4 * used
