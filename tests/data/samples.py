"""Small files and texts for the data tests."""

import json
from pathlib import Path

from leanmill.data.config import DataConfig, HfDataset


WORDS = ["mill", "grain", "stone", "water", "wheel", "flour", "lean", "weight", "token", "naïve", "£5", "漢字"]


def sentences(count: int, start: int = 0) -> list[str]:
    """Distinct texts of 1 to 40 words."""
    return [
        f"text {n}: " + " ".join(WORDS[(n * 7 + i * (1 + n % 3)) % len(WORDS)] for i in range(1 + (n * n) % 40))
        for n in range(start, start + count)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_texts(path: Path, count: int) -> str:
    return write_jsonl(path, [{"text": text} for text in sentences(count)])


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Conversations of one or two questions and answers."""
    found = []
    for n in range(count):
        turns = [{"role": "system", "content": "be brief"}] if n % 3 == 0 else []
        for turn in range(1 + n % 2):
            turns += [
                {"role": "user", "content": f"question {n} {turn} " + "why " * (n % 5)},
                {"role": "assistant", "content": f"answer {n} {turn}"},
            ]
        found.append(turns)
    return found


def hf_config(path: str, tmp_path: Path, *, source: dict | None = None, **data) -> DataConfig:
    """A data section over local files with its cache beside them."""
    source = {"validation_fraction": 0.0, **(source or {})}
    return DataConfig(
        source=HfDataset(path=path, **source),
        **{"sequence_length": 32, "cache_dir": str(tmp_path / "cache"), **data},
    )
