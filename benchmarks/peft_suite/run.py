"""Run PEFT's own tests on our tuners: those of the installed version, from its source distribution on PyPI.

The tests are not in PEFT's wheel and nothing of them is kept in this repository: the source distribution is fetched by
pip, or given by `--source`, unpacked into a folder of its own, and a plugin puts our tuners into its tables
(`plugin.py`). Models are made here, so nothing is fetched from a hub. Counts go to
`benchmarks/results/peft_suite.json`; the exit status is that of the tests.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from cases import TUNERS
from plugin import MODELS


HERE = Path(__file__).resolve().parent
RESULT = HERE.parent / "results" / "peft_suite.json"
MODULES = ("test_config", "test_custom_models", *MODELS)

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1024}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_SMALL, "intermediate_size": 64, "pad_token_id": 0},
    "opt": {**_SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "bert": {**_SMALL, "intermediate_size": 64},
    "t5": {
        "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 1024,
        "decoder_start_token_id": 0,
    },
}  # fmt: skip
AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "SEQ_CLS": "AutoModelForSequenceClassification",
}


def fetch(folder: Path, version: str) -> Path:
    """Download PEFT's source distribution of `version` into `folder` through pip, and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    subprocess.run([*command, "--no-build-isolation", "--dest", str(folder), f"peft=={version}"], check=True)
    return next(folder.glob("peft-*.tar.gz"))


def unpack(source: Path, folder: Path) -> None:
    """Unpack the tests of a source distribution to `folder`/tests, as a package."""
    with tarfile.open(source) as archive:
        for member in archive.getmembers():
            _, _, member.name = member.name.partition("/")
            if member.name.startswith("tests/"):
                archive.extract(member, folder, filter="data")
    (folder / "tests" / "__init__.py").touch()
    # Tests of images import it at the top; none of those that run here uses it.
    (folder / "diffusers.py").write_text("class StableDiffusionPipeline: ...\n")


def make_models(folder: Path) -> None:
    """Write the models of every task with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    for _, task, names in MODELS.values():
        for name in names:
            config = transformers.AutoConfig.for_model(name, **CONFIGS[name])
            getattr(transformers, AUTO[task]).from_config(config).save_pretrained(folder / task.lower() / name)


def run(module: str, folder: Path, tuners: list[str], arguments: list[str]) -> tuple[int, dict[str, Any]]:
    """Run one module of tests in a process of its own; return its status and the counts of each tuner."""
    counts = folder / f"{module}.json"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "PEFT_SUITE_MODELS": str(folder / "models"),
        "PEFT_SUITE_COUNTS": str(counts),
        "PEFT_SUITE_TUNERS": " ".join(tuners),
    }
    own = ["-p", "plugin", "-p", "no:cacheprovider", "-q", "--rootdir", str(folder), f"tests/{module}.py"]
    command = [sys.executable, "-m", "pytest", *own, *arguments]
    status = subprocess.run(command, cwd=folder, env=environment, check=False).returncode
    return status, json.loads(counts.read_text()) if counts.exists() else {}


def total(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Sum the counts of all modules, by tuner."""
    sums: dict[str, Any] = {}
    for counts in found.values():
        for name, own in counts.items():
            into = sums.setdefault(name, {"passed": 0, "failed": 0, "skipped": 0, "reasons_of_skips": Counter()})
            into["reasons_of_skips"].update(own.get("reasons_of_skips", {}))
            for outcome in ("passed", "failed", "skipped"):
                into[outcome] += own.get(outcome, 0)
    return sums


def write(found: dict[str, Any]) -> None:
    """Put the counts of the tuners that ran into the committed file, with what they ran with."""
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {"tuners": {}}
    versions = {name: importlib.metadata.version(name) for name in ("peft", "torch", "transformers")}
    ran_with = {"date": datetime.date.today().isoformat(), "versions": versions}
    tuners = {**known["tuners"], **{name: {**counts, **ran_with} for name, counts in found.items()}}
    RESULT.write_text(json.dumps({"modules": MODULES, "tuners": dict(sorted(tuners.items()))}, indent=2) + "\n")
    print(f"-> {RESULT}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="PEFT's source distribution, where there is no network")
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=MODULES)
    parser.add_argument(
        "--tuners", nargs="+", choices=list(TUNERS), default=list(TUNERS), help="others keep their counts"
    )
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --; then no counts are written")
    arguments = parser.parse_args()
    version = importlib.metadata.version("peft")
    with tempfile.TemporaryDirectory(prefix="peft-suite-") as scratch:
        folder = Path(scratch)
        unpack(arguments.source or fetch(folder, version), folder)
        make_models(folder / "models")
        ran = {module: run(module, folder, arguments.tuners, arguments.pytest) for module in arguments.modules}
    found = total({module: counts for module, (_, counts) in ran.items()})
    print(json.dumps(found, indent=2))
    if not arguments.pytest and arguments.modules == MODULES:
        write(found)
    sys.exit(any(status for status, _ in ran.values()))


if __name__ == "__main__":
    main()
