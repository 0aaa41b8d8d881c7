"""Recipes as tired people write them: small runnable ones, and seeded ways to spoil them."""

from __future__ import annotations

import copy
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from leanmill.checkpoint.config import CheckpointConfig
from leanmill.core.registry import TECHNIQUES, technique_class
from leanmill.data.config import DataConfig, HfDataset, TokenizerConfig
from leanmill.models.config import ModelConfig
from leanmill.optim.config import AdamW, ScheduleConfig
from leanmill.recipe.sections import BatchConfig, EvalConfig, LogConfig, Sections, TrainConfig


_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}
_CONFIGS: list[dict[str, Any]] = [
    _LLAMA,
    {**_LLAMA, "model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    {**_LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300, "n_positions": 128},
]
_TECHNIQUES: list[list[dict[str, Any]]] = [
    [],
    [{"type": "ternary"}],
    [{"type": "nm_sparsity", "num_kept": 2, "group_size": 4}],
    [{"type": "lora", "rank": 4, "alpha": 8}],
    [{"type": "lora", "rank": 4, "where": "branch", "targets": ["q_proj", "c_attn"]}],
    [{"type": "nm_sparsity", "gradient": "sr_ste"}, {"type": "ternary"}],
]
_JUNK: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    7.5,
    -0.5,
    10**12,
    2**62,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "auto",
    "7",
    "yes please",
    "日本語 ü",
    "a/b",
    "../..",
    "{}",
    [],
    [1],
    [[1, [2, [3]]]],
    ["x", None],
    {},
    {"a": {"b": {"c": 1}}},
    {"type": None},
    {"type": ["a"]},
]
_PLAUSIBLE: list[Any] = [1, 2, 4, 8, 16, 64, 128, 0.05, 0.5, 0.9, 1.0, 2.0, True, False, None, ["q_proj"], [0.5, 0.9]]
_SECTIONS: list[tuple[tuple[str, ...], type[BaseModel]]] = [
    ((), Sections),
    (("model",), ModelConfig),
    (("data",), DataConfig),
    (("data", "source"), HfDataset),
    (("data", "tokenizer"), TokenizerConfig),
    (("optimizer",), AdamW),
    (("schedule",), ScheduleConfig),
    (("batch",), BatchConfig),
    (("train",), TrainConfig),
    (("train",), TrainConfig),
    (("eval",), EvalConfig),
    (("checkpoint",), CheckpointConfig),
    (("log",), LogConfig),
    *((("techniques",), technique_class(name)) for name in TECHNIQUES),
]
_SIGNS = ":[]{}'\"#&*!|>%@`,?-\t\n "
_CONFLICTS = [
    ["train.total_tokens=4096", "train.steps=3"],
    ["train.steps=null"],
    ["model.path=org/name"],
    ["model.config=null"],
    ["data.sequence_length=1000"],
    ["batch.tokens_per_step=100"],
    ["data.task=sft"],
    ["data.task=sft", "data.long_documents=split"],
    ["train.cross_entropy_weight=0"],
    ["engine={type: deepspeed, stage: 0, offload_optimizer: {device: cpu}}"],
    ["engine={type: fsdp, shard_size: 0}"],
    ["schedule={type: infinite, min_factor: 0}"],
    ["schedule.warmup_steps=5.5"],
    ["techniques=[{type: lora, dropout: 0.5}]"],
    ["techniques=[{type: ternary}, {type: ternary}]"],
    ["techniques=[{type: lora}, {type: lora}]"],
    ["techniques=[{type: nm_sparsity, num_kept: 4, group_size: 4}]"],
    ["techniques=[{type: nm_sparsity, num_kept: 2, group_size: 5}]"],
    ["techniques=[{type: distill, teacher: ./nowhere}]"],
    ["data.tokenizer.vocab_size=5000"],
    ["model.config.vocab_size=270"],
    ["eval.tokens_per_domain=1"],
    ["checkpoint.resume=./nowhere"],
    ["run_dir=/proc/version/x"],
    ["model.revision=main"],
    ["model.max_context=5"],
    ["model.attention=flex_attention", "train.activation_checkpointing=full"],
]
_GOOD = [
    ["optimizer={type: lion, lr: 1e-4}"],
    ["optimizer={type: adamw, lr: 1e-3, lookahead: {every: 1}}"],
    ["schedule={type: wsd, warmup_steps: 1}"],
    ["train.activation_checkpointing=full"],
    ["train.activation_checkpointing=selective", "train.precision=bf16"],
    ["model.attention=eager"],
    ["data.document_mask=false"],
    ["train.logits_chunk_tokens=16"],
    ["engine=single", "train.non_finite=skip"],
    ["batch.tokens_per_micro_batch=32"],
    ["train.deterministic=true"],
    ["model.config.num_hidden_layers=1"],
    ["techniques.0={type: ternary, scale: mse}"],
    ["techniques=[{type: lora, rank: 3}, {type: nm_sparsity, num_kept: 1, group_size: 8}]"],
    ["checkpoint.keep_best=false", "checkpoint.asynchronous=false"],
]
_OVERRIDES = [
    "train.steps",
    "=3",
    "a..b=1",
    "train.steps.more=1",
    "techniques.5.type=lora",
    "techniques.²=1",
    "techniques.0.type.x=1",
    "optimizer.LR=1",
    "train=[",
    "train={a: b: c}",
    "name='",
    "data.source.path=*x",
    "name=!!python/object/apply:os.system [ls]",
    ".".join("abcdefghijklmnopqrstuvwxyz") + "=1",
    "train.steps=" + "[" * 500,
    "train.steps=1" + "0" * 400,
    "seed=0x" + "f" * 40,
    "name=2024-99-99",
    "model.config.1=2",
    "x=hf_" + "abcdefghij" * 3,
    "data.source=[1, [2, [3]]]",
    "engine={type: {type: fsdp}}",
    "log=&a [*a]",
    "train={<<: {steps: 1}}",
    "data.source.sources.0.x.y=1",
]


@dataclass
class Mutant:
    """A recipe's text, the overrides given with it, and what was done to them."""

    text: str
    overrides: list[str] = field(default_factory=list)
    story: list[str] = field(default_factory=list)


def recipe(rng: random.Random, files: Path) -> dict[str, Any]:
    """Return a small recipe that runs on one process without a network."""
    return {
        "name": "mutant",
        "run_dir": str(files / "runs" / "{name}"),
        "device": "cpu",
        "model": {"config": copy.deepcopy(rng.choice(_CONFIGS))},
        "data": {
            "source": {"type": "hf", "path": str(files / "text.jsonl"), "validation_fraction": 0.1},
            "tokenizer": {"vocab_size": 300},
            "sequence_length": 32,
            "cache_dir": str(files / "cache"),
        },
        "techniques": copy.deepcopy(rng.choice(_TECHNIQUES)),
        "engine": "auto",
        "optimizer": {"type": "adamw", "lr": 1e-3, "weight_decay": 0.1},
        "schedule": {"type": "cosine", "warmup_steps": 1, "min_factor": 0.1},
        "batch": {"tokens_per_step": 128, "tokens_per_micro_batch": 64},
        "train": {"steps": 2, "precision": "fp32", "max_grad_norm": 1.0},
        "eval": {"every_steps": 2, "tokens_per_domain": 64},
        "checkpoint": {"every_steps": 2, "keep_last": 2},
        "log": {"every_steps": 1, "tensorboard": False, "report": False},
    }


def mutants(count: int, files: Path, seed: int = 0) -> list[Mutant]:
    """Return `count` mutated recipes over `files` (which holds `text.jsonl`); the same for the same seed."""
    return [_mutant(random.Random(f"{seed}-{index}"), files) for index in range(count)]


def _mutant(rng: random.Random, files: Path) -> Mutant:
    raw = recipe(rng, files)
    hows = [_drop, _rename, _replace, _number, _field, _field, _model_config]
    story = [rng.choice(hows)(rng, raw) for _ in range(rng.choice([0, 0, 1, 1, 1, 2]))]
    mutant = Mutant(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True), story=story)
    for _ in range(rng.choice([0, 0, 1]) if story else 1):
        how = rng.choice([_damage, _repeat, _alias, _override, _override, _override])
        mutant.story.append(how(rng, mutant))
    return mutant


def _places(raw: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    return [place for key, value in items for place in ((*path, key), *_places(value, (*path, key)))]


def _owner(raw: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        raw = raw[key]
    return raw


def _drop(rng: random.Random, raw: Any) -> str:
    path = rng.choice(_places(raw))
    del _owner(raw, path)[path[-1]]
    return f"drop {path}"


def _rename(rng: random.Random, raw: Any) -> str:
    path = rng.choice([place for place in _places(raw) if isinstance(place[-1], str)])
    name = path[-1]
    cut = rng.randrange(len(name))
    new = rng.choice([name[:cut] + name[cut + 1 :], name.upper(), name.replace("_", "-"), name + "s", name + "é", "1"])
    owner = _owner(raw, path)
    owner[new] = owner.pop(name)
    return f"rename {path} to {new!r}"


def _replace(rng: random.Random, raw: Any) -> str:
    path, value = rng.choice(_places(raw)), copy.deepcopy(rng.choice(_JUNK))
    _owner(raw, path)[path[-1]] = value
    return f"replace {path} by {value!r}"


def _number(rng: random.Random, raw: Any) -> str:
    def is_number(path: tuple[Any, ...]) -> bool:
        return type(_owner(raw, path)[path[-1]]) in (int, float)

    found = [path for path in _places(raw) if is_number(path)]
    if not found:
        return _drop(rng, raw)
    path = rng.choice(found)
    old = _owner(raw, path)[path[-1]]
    half = old // 2 if isinstance(old, int) else old / 2
    new = rng.choice([-old, 0, old + 1, old * 2, half, half, old * 10**9, 10**30, str(old), float(old)])
    _owner(raw, path)[path[-1]] = new
    return f"number {path} from {old} to {new}"


def _field(rng: random.Random, raw: Any) -> str:
    """Set any key there is, known from the models of the recipe, to something that may suit it."""
    section, model = rng.choice(_SECTIONS)
    key = rng.choice([name for name in model.model_fields if name != "type"])
    value = copy.deepcopy(rng.choice([*_JUNK, *_PLAUSIBLE, *_PLAUSIBLE, *_PLAUSIBLE]))
    if section == ("techniques",):
        raw["techniques"] = [{"type": model.model_fields["type"].default, key: value}]
        return f"technique {model.__name__}.{key} = {value!r}"
    owner = raw
    for name in section:
        below = owner.get(name) if isinstance(owner, dict) else None
        if not isinstance(below, dict):
            return _drop(rng, raw)
        owner = below
    owner[key] = value
    return f"{section}.{key} = {value!r}"


def _model_config(rng: random.Random, raw: Any) -> str:
    config = (raw.get("model") or {}).get("config") if isinstance(raw.get("model"), dict) else None
    if not isinstance(config, dict):
        return _drop(rng, raw)
    keys = [*config, "head_dim", "rope_theta", "rope_parameters", "hidden_act", "layer_types", "rms_norm_eps", "dtype"]
    keys += ["attention_dropout", "pad_token_id", "initializer_range", "num_experts_per_tok", "return_dict", "n_inner"]
    key, value = rng.choice(keys), copy.deepcopy(rng.choice([*_JUNK, 5, 6, 8, 9, 16, 33, 64, "gelu", "llama"]))
    config[key] = value
    return f"model.config.{key} = {value!r}"


def _damage(rng: random.Random, mutant: Mutant) -> str:
    text = mutant.text
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text))
        cut = rng.choice([0, 1, 1, 5])
        text = text[:at] + rng.choice([*_SIGNS, "", "  ", "\x00", "é"]) + text[at + cut :]
    if rng.random() < 0.2:
        text = text[: rng.randrange(len(text))]
    mutant.text = text
    return "damaged text"


def _repeat(rng: random.Random, mutant: Mutant) -> str:
    lines = mutant.text.splitlines()
    at = rng.randrange(len(lines))
    lines.insert(rng.choice([at, len(lines)]), lines[at])
    mutant.text = "\n".join(lines) + "\n"
    return f"repeat line {at + 1}"


def _alias(rng: random.Random, mutant: Mutant) -> str:
    kind = rng.choice(["bomb", "self", "merge", "share", "unknown"])
    if kind == "bomb":
        rows = [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}' if i else 'y'] * 9)}]" for i in range(9)]
        mutant.text = "\n".join([*rows, mutant.text])
    elif kind == "self":
        mutant.text += "extra: &e [1, *e]\n"
    elif kind == "merge":
        mutant.text = re.sub(r"^batch:\n", "batch: &b\n", mutant.text, flags=re.M) + "cluster:\n  <<: *b\n"
    elif kind == "share":
        text = re.sub(r"every_steps: (\d+)", r"every_steps: &n \1", mutant.text, count=1)
        mutant.text = text + "cluster: {init_timeout_seconds: *n}\n"
    else:
        mutant.text += "cluster: *nowhere\n"
    return f"alias: {kind}"


def _override(rng: random.Random, mutant: Mutant) -> str:
    given = rng.choice([rng.choice(_CONFLICTS), rng.choice(_GOOD), rng.choice(_GOOD), [rng.choice(_OVERRIDES)]])
    mutant.overrides += given
    return f"overrides {given}"
