"""`leanmill compress` on a model four times larger than the memory its process may have.

The limit is the system's (RLIMIT_DATA): an allocation above it fails. It takes in the interpreter, torch and
transformers. The model's values are random; it is written a block at a time.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml


TIMES_LARGER = 4
NUM_ROWS, LENGTH = 8, 128
"""Of the calibration."""
PASSES: dict[str, dict[str, Any]] = {
    "magnitude": {"num_kept": 2, "group_size": 4},
    "wanda": {"num_kept": 2, "group_size": 4},
    "sparsegpt": {"num_kept": 2, "group_size": 4},
    "gptq": {},
}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("passes", nargs="*", default=list(PASSES), help=f"of {', '.join(PASSES)}; default all")
    parser.add_argument("--num-layers", type=int, default=56)
    parser.add_argument("--worker", nargs=3, metavar=("RECIPE", "OUT", "LIMIT_BYTES"), help="run one under a limit")
    arguments = parser.parse_args()
    if arguments.worker:
        compress_under(*arguments.worker)
        return
    from machine import conditions, write_result

    measured_under = conditions()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model_bytes, block_bytes = write_model(folder / "model", arguments.num_layers)
        # The corpus and its tokenizer are prepared without a limit, as those of a model at hand are.
        recipe = write_recipe(folder, "magnitude", num_rows=1)
        tokenise(folder, recipe)
        for name in arguments.passes:
            started = time.perf_counter()
            command = [sys.executable, __file__, "--worker", str(write_recipe(folder, name)), str(folder / name)]
            command.append(str(model_bytes // TIMES_LARGER))
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            peaks = json.loads(done.stdout.splitlines()[-1])
            figures[name] = peaks | {
                "blocks_above_start": (peaks["peak_bytes"] - peaks["start_bytes"]) / block_bytes,
                "seconds": round(time.perf_counter() - started),
            }
            shutil.rmtree(folder / name)
    sizes = {
        "model_bytes": model_bytes,
        "limit_bytes": model_bytes // TIMES_LARGER,
        "block_bytes": block_bytes,
        "hidden_states_bytes": 4 * NUM_ROWS * LENGTH * CONFIG["hidden_size"],
    }
    write_result("compress_memory", sizes | figures, measured_under)


def write_model(folder: Path, num_layers: int) -> tuple[int, int]:
    """Write a Llama folder, a file a block; return its bytes and those of a block."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    config = AutoConfig.for_model(**CONFIG, num_hidden_layers=num_layers)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    files = {name: f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors" for name in shapes}
    for file in sorted(set(files.values())):
        names = [name for name in shapes if files[name] == file]
        save_file({name: torch.randn(shapes[name]) / 32 for name in names}, folder / file, metadata={"format": "pt"})
    total = sum(4 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total, sum(4 * shape.numel() for name, shape in shapes.items() if ".layers.0." in name)


def write_recipe(folder: Path, name: str, num_rows: int = NUM_ROWS) -> Path:
    """Write the recipe of one pass."""
    data = {"source": {"type": "local_corpus", "max_bytes": 1_000_000, "domains": {"python": 1.0}}}
    data |= {"tokenizer": {"vocab_size": CONFIG["vocab_size"]}, "sequence_length": LENGTH}
    recipe = {
        "device": "cpu",
        "precision": "fp32",
        "model": {"path": str(folder / "model")},
        "data": data | {"cache_dir": str(folder / "cache")},
        "calibration": {"num_rows": num_rows, "rows_per_batch": 1},
        "passes": [{"type": name, **PASSES[name]}],
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def tokenise(folder: Path, recipe: Path) -> None:
    """Train the tokenizer and save it with the model."""
    from leanmill.data.build import build_tokenizer
    from leanmill.recipe.compress import CompressRecipe

    given = CompressRecipe.model_validate(yaml.safe_load(recipe.read_text()))
    build_tokenizer(given.data, seed=given.seed).save_pretrained(folder / "model")


def compress_under(recipe: str, out: str, limit_bytes: str) -> None:
    """Compress in this process, which may allocate so much; print its anonymous memory before and at most."""
    # What an interpreter with these holds is no part of a block.
    from transformers.models.llama import modeling_llama  # noqa: F401

    import leanmill.trainer.passes.run  # noqa: F401
    from leanmill.cli.main import main as leanmill

    resource.setrlimit(resource.RLIMIT_DATA, (int(limit_bytes), int(limit_bytes)))
    start = anonymous_bytes()
    with sampled() as peaks:
        status = leanmill(["compress", recipe, "--out", out])
    print(json.dumps({"start_bytes": start, "peak_bytes": max([start, *peaks])}))
    sys.exit(status)


@contextmanager
def sampled() -> Iterator[list[int]]:
    """Collect this process's anonymous memory every 20 ms."""
    found: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            found.append(anonymous_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield found
    stop.set()
    thread.join()


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


if __name__ == "__main__":
    main()
