"""`leanmill init`: a folder with a recipe to start from, which comes with the package."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from leanmill.core.errors import ConfigError


@dataclass(frozen=True)
class Template:
    """A recipe to start from, `templates/<name>.yaml`."""

    summary: str
    command: str = "leanmill launch recipe.yaml"
    """What runs it."""
    example: str | None = None
    """A file of `templates` that it reads, copied to `data/`."""
    needs_model: bool = True


TEMPLATES: dict[str, Template] = {
    "pretrain": Template("a small model from scratch on text files", needs_model=False),
    "moe": Template("a small mixture of experts from scratch", needs_model=False),
    "sft": Template("LoRA on conversations in a JSONL file", example="chats.jsonl"),
    "sparse": Template("a trained model to 2:4 sparsity, its dense self the teacher"),
    "distill": Template("a small student of a trained teacher"),
    "compress": Template(
        "a model folder pruned in one shot", command="leanmill compress recipe.yaml --out pruned-model"
    ),
}
DEFAULT_MODEL = "Qwen/Qwen3-0.6B"
DEFAULT_VOCAB_SIZE = 151936
"""Of `DEFAULT_MODEL`."""
_IS_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*")
"""Text that needs no quotes in YAML, unless it is a word such as `no`."""


def run(args: argparse.Namespace) -> int:
    """Write the folder `args.folder` and say what to type next.

    Raises:
        ConfigError: It is there already and not empty, or a model is named for what trains from scratch.
    """
    template, folder = TEMPLATES[args.template], Path(args.folder)
    if args.model is not None and not template.needs_model:
        raise ConfigError(f"--model goes with a template that starts from one, {args.template} does not; leave it out")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already; name a new folder")
    (folder / "data").mkdir(parents=True)
    values = {
        "NAME": _in_yaml(folder.resolve().name),
        "MODEL": _in_yaml(_seen_from(args.model)),
        "VOCAB_SIZE": str(_vocab_size(args.model)),
    }
    text = re.sub(r"\b(?:NAME|MODEL|VOCAB_SIZE)\b", lambda found: values[found[0]], _shipped(f"{args.template}.yaml"))
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    if template.example is not None:
        (folder / "data" / template.example).write_text(_shipped(template.example), encoding="utf-8")
    print(f"wrote {folder / 'recipe.yaml'}: {template.summary}")
    print(f"next: cd {shlex.quote(str(folder))}")
    if template.command.startswith("leanmill launch"):
        print("      leanmill check recipe.yaml     # what it will do, in words")
    print(f"      {template.command}")
    return 0


def _vocab_size(model: str | None) -> int:
    """The model's own where its folder is here; of a hub name nothing is fetched, and the recipe says to set it."""
    try:
        config = json.loads((Path(model or "") / "config.json").read_text(encoding="utf-8"))
        return int(config["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return DEFAULT_VOCAB_SIZE


def _shipped(name: str) -> str:
    from importlib.resources import files

    return (files("leanmill.cli") / "templates" / name).read_text(encoding="utf-8")


def _in_yaml(text: str) -> str:
    import yaml

    return text if _IS_PLAIN.fullmatch(text) and yaml.safe_load(text) == text else json.dumps(text)


def _seen_from(model: str | None) -> str:
    """A local model's path stays right once the shell is in another folder; a hub name is as it is."""
    if model is None:
        return DEFAULT_MODEL
    return str(Path(model).resolve()) if Path(model).is_dir() else model
