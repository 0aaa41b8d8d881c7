"""A model as a draft: transformers' assisted generation, and what of it the larger model accepted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.checkpoint.finding import locate
from leanmill.core.errors import ConfigError
from leanmill.core.noise import derive_seed
from leanmill.core.paths import expand_user
from leanmill.data.build import build_eval_data
from leanmill.data.config import DataConfig
from leanmill.data.tokenizer import other_tokens
from leanmill.evaluate.asking import Asked
from leanmill.evaluate.models import open_for_evaluation
from leanmill.evaluate.scores import Score
from leanmill.recipe.evaluate import Speculative


@dataclass
class Counts:
    """What happened while texts were continued."""

    forwards: int = 0
    """Of the target."""
    proposed: int = 0
    """Tokens of the draft that the target looked at."""
    added: int = 0
    """Tokens that came to the texts."""

    @property
    def accepted(self) -> int:
        """Proposed tokens that stayed: a forward adds those, and one of the target's own."""
        return self.added - self.forwards


def ask(config: Speculative, data: DataConfig, seed: int, asked: Asked) -> list[Score]:
    """Continue held-out text with the model as the draft of `config.target`.

    Raises:
        ConfigError: The target is not there or has other tokens, a text does not fit, or none is held out.
    """
    folder = _folder(config.target)
    difference = other_tokens(asked.opened.tokenizer, str(folder)) if (folder / "tokenizer.json").is_file() else ""
    target = open_for_evaluation(folder, asked.ranks.device)
    draft, sizes = asked.opened.model, [one.config.vocab_size for one in (target.model, asked.opened.model)]
    if difference or sizes[0] != sizes[1]:
        said = difference or f"{sizes[0]} rows of its embedding, and the draft {sizes[1]}"
        raise ConfigError(
            f"speculative.target {config.target} has other tokens than the draft: {said}; name a target with the "
            f"draft's tokenizer and size"
        )
    for opened in (target, asked.opened):
        if opened.longest is not None and config.prompt_tokens + config.new_tokens > opened.longest:
            raise ConfigError(
                f"speculative: {config.prompt_tokens} + {config.new_tokens} tokens are more than a model's "
                f"{opened.longest}; lower speculative.new_tokens"
            )
    counts = Counts()
    devices = [] if asked.ranks.device.type == "cpu" else [asked.ranks.device]
    with torch.random.fork_rng(devices), torch.no_grad():
        for number, prompt in enumerate(_prompts(config, data, asked)):
            torch.manual_seed(derive_seed(seed, "speculative", number))
            with torch.autocast(asked.ranks.device.type, torch.bfloat16, enabled=asked.precision == "bf16"):
                add_to(counts, config, target.model, draft, prompt.to(asked.ranks.device))
    common: dict[str, Any] = {"task": "speculative", "group": f"{config.num_proposed} proposed"}
    share = counts.accepted / max(1, counts.proposed)
    return [
        Score(**common, metric="accepted", value=share, count=counts.proposed),
        Score(**common, metric="tokens/pass", value=counts.added / max(1, counts.forwards), count=counts.forwards),
    ]


def add_to(counts: Counts, config: Speculative, target: Any, draft: Any, prompt: Tensor) -> Tensor:
    """Continue one prompt [1, P] and count what happened; return the text [1, P + new tokens]."""
    from transformers import GenerationConfig

    of_draft = draft.generation_config
    # As many proposals each time, whatever the draft thinks of its own: otherwise drafts would be asked differently.
    draft.generation_config = GenerationConfig(
        num_assistant_tokens=config.num_proposed,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    # Nothing of the model's own, such as an end of text: after one the next text begins, and all continue as long.
    target.generation_config = GenerationConfig()
    draws = {"temperature": config.temperature, "top_k": 0, "top_p": 1.0} if config.temperature else {}
    settings = GenerationConfig(
        max_new_tokens=config.new_tokens,
        do_sample=config.temperature > 0,
        use_cache=True,
        **draws,
    )
    try:
        with _counted(target, prompt.shape[1], counts):
            text: Tensor = target.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, assistant_model=draft
            )
    finally:
        draft.generation_config = of_draft  # later tasks ask it too
    counts.added += text.shape[1] - prompt.shape[1]
    return text


@contextmanager
def _counted(target: nn.Module, prompt_tokens: int, counts: Counts) -> Iterator[None]:
    """Count forwards of the target, and the proposals among their tokens."""
    is_first = True

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal is_first
        # The first sees the prompt and the proposals, each other one the last token and the proposals.
        counts.proposed += kwargs["input_ids"].shape[1] - (prompt_tokens if is_first else 1)
        counts.forwards, is_first = counts.forwards + 1, False

    hook = target.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _folder(path: str) -> Path:
    folder = expand_user(path)
    if (folder / "config.json").is_file():
        return folder
    found = locate(folder).path
    if found is None:
        raise ConfigError(f"speculative.target {path!r} has no checkpoint; name a run, a checkpoint or a model folder")
    return found


def _prompts(config: Speculative, data: DataConfig, asked: Asked) -> list[Tensor]:
    """Beginnings of held-out text, [1, P] each, of all domains in turn."""
    size = config.prompt_tokens
    domains = build_eval_data(data, asked.opened.tokenizer, tokens_per_domain=config.num_prompts * data.sequence_length)
    if not domains:
        raise ConfigError(
            "speculative continues held-out text, and data.source holds none out; set validation_fraction"
        )
    if size > data.sequence_length:
        raise ConfigError(
            f"speculative.prompt_tokens={size} is more than data.sequence_length={data.sequence_length}; lower it"
        )
    most = max(len(domain.rows["input_ids"]) for domain in domains)
    rows = [
        domain.rows["input_ids"][index : index + 1, :size]
        for index in range(most)
        for domain in domains
        if index < len(domain.rows["input_ids"])
    ]
    return rows[: config.num_prompts]
