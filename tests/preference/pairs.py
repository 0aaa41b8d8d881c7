"""Rows of pairs for tests, and the same conversations one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.core.tiny import VOCAB_SIZE


PROMPTS = [[3, 2], [1], [4]]
"""Tokens of the prompt of each pair, row by row."""
ANSWERS = [[(4, 2, 3), (1, 5, 2)], [(6, 3, 1)], [(2, 2, 7)]]
"""Tokens of the chosen, the rejected and the mismatched answer."""


def rows(num_pieces: int, *, length: int = 37, seed: int = 0) -> dict[str, Tensor]:
    """Packed rows [3, length] as `TrainData.next_rows` gives them."""
    generator = torch.Generator().manual_seed(seed)
    fields: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "position_ids": []}
    for prompts, answers in zip(PROMPTS, ANSWERS, strict=True):
        parts: dict[str, list[Tensor]] = {name: [] for name in fields}
        for prompt_length, answer_lengths in zip(prompts, answers, strict=True):
            prompt = torch.randint(VOCAB_SIZE, (prompt_length,), generator=generator)
            for answer_length in answer_lengths[:num_pieces]:
                ids = torch.cat([prompt, torch.randint(VOCAB_SIZE, (answer_length,), generator=generator)])
                labels = torch.full_like(ids, -100)
                labels[prompt_length - 1 : -1] = ids[prompt_length:]
                for name, value in (("input_ids", ids), ("labels", labels), ("position_ids", torch.arange(len(ids)))):
                    parts[name].append(value)
        padding = length - sum(map(len, parts["input_ids"]))
        parts["input_ids"].append(torch.zeros(padding, dtype=torch.int64))
        parts["labels"].append(torch.full((padding,), -100))
        parts["position_ids"].append(torch.arange(padding))
        for name in fields:
            fields[name].append(torch.cat(parts[name]))
    return {name: torch.stack(value) for name, value in fields.items()} | {"row_ids": torch.arange(3)}


def conversations(batch: dict[str, Tensor], num_pieces: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Ids and labels of every conversation with labels, pair by pair, cut out of the rows."""
    found = []
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
        for start, end in zip(starts, starts[1:], strict=False):
            if (labels[start:end] != -100).any():
                found.append((ids[start:end], labels[start:end]))
    return [found[index : index + num_pieces] for index in range(0, len(found), num_pieces)]


def log_probability(model, ids: Tensor, labels: Tensor) -> Tensor:
    """Sum of the log-probabilities of the labels of one conversation."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
    kept = labels != -100
    return logits.log_softmax(-1)[kept].gather(-1, labels[kept][:, None]).sum()
