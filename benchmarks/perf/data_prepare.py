"""Tokenising data to a folder beside the tokenizer library alone, and how soon a prepared run has its first batch."""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from machine import conditions, write_result
from options import DEFAULTS
from tokenizers import Tokenizer

from leanmill.data.build import build_tokenizer, build_train_data
from leanmill.data.config import DataConfig, HfDataset, TokenizerConfig
from leanmill.data.offsets import write_offsets
from leanmill.data.prepare import prepare_data
from leanmill.data.prepared import MANIFEST


def texts(num_bytes: int) -> Iterator[str]:
    """The standard library's sources, over and over."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    left = num_bytes
    while True:
        for path in files:
            text = path.read_text(encoding="utf-8", errors="replace")
            yield text
            left -= len(text)
            if left <= 0:
                return


def corpus(folder: Path, num_bytes: int) -> DataConfig:
    """Write a JSONL file and return the section that reads it."""
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts(num_bytes))
    source = HfDataset(path=str(folder / "text.jsonl"), validation_fraction=0.0)
    tokenizer = TokenizerConfig(vocab_size=8192, num_training_bytes=4_000_000)
    return DataConfig(source=source, tokenizer=tokenizer, sequence_length=1024, cache_dir=str(folder / "cache"))


def throughput(config: DataConfig, folder: Path, repeats: int) -> dict[str, object]:
    """Tokens a second of the library on documents in memory and of a preparation, in turn."""
    tokenizer = build_tokenizer(config)
    library = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    lines = (folder / "text.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    pairs = []
    for repeat in range(repeats):
        started = time.perf_counter()
        num_tokens = sum(len(one.ids) for one in library.encode_batch_fast(documents, add_special_tokens=False))
        alone = time.perf_counter() - started
        started = time.perf_counter()
        found = prepare_data(config, folder / f"prepared-{repeat}", tell=lambda line: None)
        pairs.append((num_tokens / alone, found.num_tokens / (time.perf_counter() - started)))
    return {
        "library_tokens_per_second": statistics.median(a for a, _ in pairs),
        "prepare_tokens_per_second": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
        "ratios": [b / a for a, b in pairs],
    }


def first_batch_seconds(folder: Path, num_tokens: int, tokens_per_document: int = 900) -> float:
    """Seconds from a prepared folder of that many random tokens to the first batch, tokenizer included."""
    manifest = json.loads((folder / MANIFEST).read_text())
    domain = folder / manifest["domains"][0]["folder"]
    generator = np.random.default_rng(0)
    num_documents = num_tokens // tokens_per_document
    tokens = generator.integers(4, 8192, num_documents * tokens_per_document, dtype=np.uint16)
    tokens.tofile(domain / "tokens-00000.bin")
    lengths = domain / "lengths-00000.npy"
    np.save(lengths, np.full(num_documents, tokens_per_document))
    write_offsets(domain, [lengths])
    manifest["domains"][0]["shards"] = [len(tokens)]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    raw = {"source": {"type": "prepared", "path": str(folder)}, "sequence_length": 1024}
    config = DataConfig.model_validate(raw)
    started = time.perf_counter()
    build_train_data(config, build_tokenizer(config), seed=0).next_rows(32)
    return time.perf_counter() - started


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=DEFAULTS["data_prepare"]["bytes"])
    parser.add_argument("--repeats", type=int, default=DEFAULTS["data_prepare"]["repeats"])
    parser.add_argument("--tokens", type=int, default=DEFAULTS["data_prepare"]["tokens"])
    args = parser.parse_args()
    measured_under = conditions()
    with tempfile.TemporaryDirectory(prefix="leanmill-bench-") as name:
        folder = Path(name)
        rates = throughput(corpus(folder, args.bytes), folder, args.repeats)
        seconds = first_batch_seconds(folder / "prepared-0", args.tokens)
    options = {"bytes": args.bytes, "repeats": args.repeats, "tokens": args.tokens}
    write_result("data_prepare", {**rates, "first_batch_seconds": seconds, **options}, measured_under)


if __name__ == "__main__":
    main()
