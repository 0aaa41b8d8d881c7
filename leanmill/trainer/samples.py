"""Text that a model in training adds to fixed prompts, under every engine.

Each token is a forward of the whole text so far, in rows of one shape: no cache of keys and values, which not every
engine, model family and technique could have in the middle of training, and nothing to compile anew. The numbers that
tokens are drawn with are a hash of seed, prompt and position, so no generator moves and no rank count matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.core.noise import derive_seed, gumbel
from leanmill.data.encoding import Encoder
from leanmill.parallel.collectives import sum_over_ranks
from leanmill.parallel.engine import Engine
from leanmill.recipe.root import Recipe
from leanmill.report.observer import Sample


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_NONE = -1


class Sampler:
    """Continues the prompts of a recipe.

    Args:
        recipe: Its `eval`, `data`, `batch` and `seed` are read.
        tokenizer: Of the run.

    Raises:
        ConfigError: A prompt leaves no room for what is to be added.
    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
        config = recipe.eval
        self._prompts, self._num_new, self._temperature = config.prompts, config.prompt_tokens, config.temperature
        self._tokenizer, self._vocab_size = tokenizer, len(tokenizer)
        self._key = torch.tensor([derive_seed(recipe.seed, "samples")])
        self._ids: list[Tensor] = []
        if self._prompts:
            encoder = Encoder(tokenizer, recipe.data.task)
            self._ids = [torch.from_numpy(encoder.prompt(text)) for text in self._prompts]
            self._check_lengths(recipe.data.sequence_length)
            self._length = max(map(len, self._ids)) + self._num_new
            self._rows_per_batch = max(1, recipe.batch.tokens_per_micro_batch // self._length)

    def _check_lengths(self, room: int) -> None:
        for index, ids in enumerate(self._ids):
            if len(ids) + self._num_new > room:
                raise ConfigError(
                    f"eval.prompts.{index} has {len(ids)} tokens, and with the {self._num_new} of eval.prompt_tokens "
                    f"more than the {room} of data.sequence_length; shorten it, or lower eval.prompt_tokens"
                )

    @torch.no_grad()
    def __call__(self, engine: Engine) -> tuple[Sample, ...]:
        """Return what the model of the engine adds to each prompt; a collective, equal on all ranks."""
        if not self._ids:
            return ()
        # Zeros for the prompts of other ranks, so that a sum is what all have.
        added = torch.zeros(len(self._ids), self._num_new, dtype=torch.int64)
        num_rows = min(self._rows_per_batch, -(-len(self._ids) // engine.data_size))
        for start in range(0, len(self._ids), num_rows * engine.data_size):
            first = start + engine.data_rank * num_rows
            mine = range(first, min(first + num_rows, len(self._ids)))
            found = self._continued(engine, mine, num_rows)
            added[mine.start : mine.start + len(mine)] = found[: len(mine)] - _NONE
        tokens = sum_over_ranks(added) + _NONE
        return tuple(self._sample(text, ids) for text, ids in zip(self._prompts, tokens, strict=True))

    def _continued(self, engine: Engine, prompts: Sequence[int], num_rows: int) -> Tensor:
        """Return the tokens added to this rank's `prompts`, [num_rows, new], `_NONE` after the end of a text.

        Ranks stop together: forwards of a sharded module are collectives.
        """
        ids, lengths = self._rows(prompts, num_rows)
        is_going = torch.arange(num_rows) < len(prompts)
        added = torch.full((num_rows, self._num_new), _NONE)
        positions = torch.arange(self._length).expand(num_rows, -1).contiguous()
        for index in range(self._num_new):
            batch = {"input_ids": ids, "position_ids": positions, "last": lengths - 1}
            on_device = {name: value.to(engine.device) for name, value in batch.items()}
            logits = engine.evaluate(on_device, wanted="next_logits")["logits"]
            token = self._chosen(logits[:, : self._vocab_size].float(), prompts, index).cpu()
            is_going &= token != self._tokenizer.eos_token_id
            added[:, index] = torch.where(is_going, token, _NONE)
            ids[torch.arange(num_rows), lengths] = torch.where(is_going, token, 0)
            lengths += 1
            if not int(sum_over_ranks(is_going.sum())):
                break
        return added

    def _rows(self, prompts: Sequence[int], num_rows: int) -> tuple[Tensor, Tensor]:
        """Return the texts so far, [num_rows, S], filled up with 0, and their lengths, at least 1."""
        ids, lengths = torch.zeros(num_rows, self._length, dtype=torch.int64), torch.ones(num_rows, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            lengths[row] = len(self._ids[prompt])
            ids[row, : lengths[row]] = self._ids[prompt]
        return ids, lengths

    def _chosen(self, logits: Tensor, prompts: Sequence[int], index: int) -> Tensor:
        if not self._temperature:
            return logits.argmax(-1)
        numbers = torch.zeros(len(logits), dtype=torch.int64)
        numbers[: len(prompts)] = torch.tensor(prompts) * self._num_new + index
        elements = numbers[:, None] * self._vocab_size + torch.arange(self._vocab_size)
        # The largest of logits with Gumbel noise is a draw from their softmax.
        noise = gumbel(self._key.to(logits.device), elements.to(logits.device))
        return (logits / self._temperature + noise).argmax(-1)

    def _sample(self, prompt: str, ids: Tensor) -> Sample:
        text = self._tokenizer.decode(ids[ids != _NONE].tolist(), skip_special_tokens=True)
        return Sample(prompt=prompt, text=text)  # type: ignore[arg-type]
