"""Models whose answers are known, over a tokenizer of single characters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.evaluate.asking import Asked
from leanmill.evaluate.models import Opened


class Characters:
    """As much of a tokenizer as tasks ask for: a token is a code point below 256, 0 ends a text."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Parrot(nn.Module):
    """Gives 1 to the token that `next_of` names after each prefix, 0 to the others, sharpened by `scale`."""

    def __init__(self, next_of: Any, *, scale: float = 30.0, longest: int | None = None) -> None:
        super().__init__()
        self.next_of, self.scale, self.num_rows = next_of, scale, 0
        self.config = SimpleNamespace(max_position_embeddings=longest)

    def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: int) -> Any:
        assert not use_cache
        self.num_rows += len(input_ids)
        logits = torch.zeros(len(input_ids), logits_to_keep, 256)
        for row, ids in zip(logits, input_ids.tolist(), strict=True):
            for place in range(logits_to_keep):
                prefix = ids[: len(ids) - logits_to_keep + place + 1]
                row[place, self.next_of(prefix)] = self.scale
        return SimpleNamespace(logits=logits)


def asked(model: nn.Module) -> Asked:
    ranks: Any = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    opened = Opened(model=model, tokenizer=Characters())
    return Asked(opened=opened, ranks=ranks, precision="fp32", rows_per_batch=2)
