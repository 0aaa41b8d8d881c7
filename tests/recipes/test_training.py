"""Every shipped recipe trains, at a size that takes seconds and from files instead of the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from leanmill.checkpoint.phases import phase_folders
from leanmill.data.build import build_tokenizer
from leanmill.data.config import DataConfig
from leanmill.data.prepare import prepare_data
from leanmill.phases.run import run as run_phases
from leanmill.recipe.io import load_recipe
from leanmill.recipe.root import Recipe
from leanmill.trainer.run import run


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
VOCAB_SIZE, NUM_STEPS, SEQUENCE_LENGTH = 300, 3, 64
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}A: {% generation %}{{ message['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}Q: {{ message['content'] }}\n{% endif %}{% endfor %}"
)
TINY_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, chats, a tokenizer with a chat template and a small trained-looking checkpoint."""
    folder = tmp_path_factory.mktemp("files")
    texts = [f"def f{i}(x):\n    return x + {i * 7 % 13}\n" * (1 + i % 3) for i in range(400)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chats = [
        [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": f"It is {i + 1}."}]
        for i in range(400)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    pairs = [{"prompt": f"{i} + 1?", "chosen": f"It is {i + 1}.", "rejected": "No idea."} for i in range(400)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    sentences = [{"anchor": f"number {i}", "positive": f"the number is {i}"} for i in range(400)]
    (folder / "sentences.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in sentences))
    source = {"type": "hf", "path": str(folder / "text.jsonl")}
    config = {"source": source, "tokenizer": {"vocab_size": VOCAB_SIZE}, "cache_dir": str(folder / "cache")}
    tokenizer = build_tokenizer(DataConfig.model_validate(config), seed=0)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY_SIZES)).save_pretrained(folder / "model")
    assert len(AutoTokenizer.from_pretrained(folder / "model")) <= VOCAB_SIZE
    return folder


def prepared(files: Path) -> Path:
    """The text as `leanmill data prepare` leaves it."""
    source = {"type": "hf", "path": str(files / "text.jsonl"), "validation_fraction": 0.1}
    tokenizer = {"path": str(files / "model")}
    config = {"source": source, "tokenizer": tokenizer, "cache_dir": str(files / "cache")}
    prepare_data(DataConfig.model_validate(config), files / "prepared", tell=lambda line: None)
    return files / "prepared"


def of_phases(recipe: Recipe, files: Path) -> list[str]:
    """The same of each phase."""
    overrides: list[str] = []
    for index, phase in enumerate(recipe.phases):
        if phase.trains:
            given = f"phases.{index}.overrides"
            overrides += [f"{given}.train.total_tokens=null", f"{given}.train.steps={NUM_STEPS}"]
            overrides.append(f"{given}.schedule.warmup_steps=1")
            own_model = (phase.overrides or {}).get("model", {}).get("config", {})
            if own_model.get("num_hidden_layers", 0) > 6:
                overrides.append(f"{given}.model.config.num_hidden_layers=4")
            named = list(enumerate((phase.overrides or {}).get("techniques", [])))
            overrides += [f"{given}.techniques.{i}.rank=8" for i, one in named if one.get("init") == "stored"]
            overrides += [f"{given}.techniques.{i}.rank=8" for i, one in named if one["type"] == "galore"]
            overrides += [f"{given}.techniques.{i}.num_layers=1" for i, one in named if one["type"] == "lisa"]
            teachers = [i for i, one in named if not str(one.get("teacher", "phase:")).startswith("phase:")]
            overrides += [f"{given}.techniques.{i}.teacher={files / 'model'}" for i in teachers]
        overrides.append(f"phases.{index}.calibration.num_rows=8")
        taken_apart = [i for i, one in enumerate(phase.passes) if one.type == "lq_lora"]
        overrides += [f"phases.{index}.passes.{i}.{key}" for i in taken_apart for key in ("rank=8", "iterations=3")]
        grouped = [i for i, one in enumerate(phase.passes) if getattr(one, "group_size", None) == 64]
        overrides += [f"phases.{index}.passes.{i}.group_size=16" for i in grouped]
        if phase.rewind_to is not None:
            overrides.append(f"phases.{index}.rewind_to={phase.rewind_to.partition('@')[0]}@2")
    return overrides


def tiny(path: Path, files: Path, run_dir: Path) -> list[str]:
    """Overrides that change sizes and places, and nothing a recipe is about."""
    recipe = load_recipe(path)
    overrides = [
        f"run_dir={run_dir}",
        "device=cpu",
        "engine=single",
        "layout.ep=1",
        "train.total_tokens=null",
        "train.epochs=null",
        f"train.steps={NUM_STEPS}",
        "train.compile=false",
        "schedule.warmup_steps=1",
        f"data.sequence_length={SEQUENCE_LENGTH}",
        f"data.cache_dir={files / 'cache'}",
        f"batch.tokens_per_micro_batch={2 * SEQUENCE_LENGTH}",
        f"batch.tokens_per_step={4 * SEQUENCE_LENGTH}",
        f"eval.every_steps={NUM_STEPS}",
        f"eval.tokens_per_domain={2 * SEQUENCE_LENGTH}",
        f"checkpoint.every_steps={NUM_STEPS}",
        "log.every_steps=1",
        "log.tensorboard=false",
    ]
    if recipe.layout.low_comm is not None:
        overrides += ["layout.low_comm.workers=1", "layout.low_comm.every_steps=1"]
    if recipe.model.config is not None:
        is_latent = "kv_lora_rank" in recipe.model.config  # attention whose heads have other sizes
        becomes_latent = any(hasattr(one, "kv_lora_rank") for phase in recipe.phases for one in phase.passes)
        head_dim = 32 if becomes_latent else 8  # so that the ranks of the recipe fit
        sizes = TINY_SIZES | ({"num_key_value_heads": 4} if is_latent else {"head_dim": head_dim})
        if recipe.model.task == "embedding":
            sizes = {name: value for name, value in sizes.items() if name not in ("num_key_value_heads", "head_dim")}
        if any(one.type == "share_blocks" for phase in recipe.phases for one in phase.passes):
            sizes = sizes | {"num_hidden_layers": 6}
        overrides += [f"model.config.{name}={value}" for name, value in sizes.items()]
    else:
        overrides.append(f"model.path={files / 'model'}")
    if recipe.data.source.type == "prepared":
        overrides.append(f"data.source.path={prepared(files)}")
    elif recipe.data.source.type == "hf":
        names = {"pretrain": "text", "sft": "chats", "preference": "pairs", "sentence_pairs": "sentences"}
        name = names[recipe.data.task]
        overrides += [f"data.source.path={files / name}.jsonl", "data.source.validation_fraction=0.1"]
        overrides += ["data.source.subset=null", "data.source.split=train", "data.source.validation_split=null"]
        if name == "sentences":
            overrides += ["data.num_negatives=0", f"data.tokenizer.vocab_size={VOCAB_SIZE}"]
        else:
            overrides.append(f"data.tokenizer.path={files / 'model'}")
    else:
        overrides += ["data.source.max_bytes=200000", "data.source.validation_fraction=0.2"]
        overrides.append(f"data.tokenizer.vocab_size={VOCAB_SIZE}")
    overrides += of_phases(recipe, files)
    techniques = list(enumerate(recipe.techniques))
    chosen = [i for i, technique in techniques if isinstance(getattr(technique, "layers", None), list)]
    overrides += [f"techniques.{i}.layers=[1]" for i in chosen]
    overrides += [f"techniques.{i}.num_layers=1" for i, technique in techniques if hasattr(technique, "num_layers")]
    grouped = [
        i for i, technique in techniques if getattr(technique, "group_size", None) and technique.type in ("lsq", "peqa")
    ]
    overrides += [f"techniques.{i}.group_size=16" for i in grouped]
    overrides += [f"techniques.{i}.rank=8" for i, technique in techniques if technique.type == "galore"]
    overrides += [f"techniques.{i}.update_every_steps=1" for i, technique in techniques if technique.type == "rigl"]
    frozen = [f"{i}.{key}" for i, technique in techniques for key in technique.frozen_models()]
    return overrides + [f"techniques.{key}={files / 'model'}" for key in frozen]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_trains(path: Path, files: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, tiny(path, files, tmp_path))
    (run_phases if recipe.phases else run)(recipe)
    folder = phase_folders(tmp_path)[-1] if recipe.phases else tmp_path
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert all(record["losses"]["total"] > 0 and record["grad_norm"] > 0 for record in steps)
    assert any(record["kind"] == "eval" for record in records)
    assert (folder / "report.html").is_file()
    assert list((folder / "checkpoints").glob("step-*/manifest.json"))
