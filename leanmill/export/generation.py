"""Text from an exported folder, one prompt at a time on the CPU, with a cache of keys and values."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.export.packed_folder import LAYERS, load
from leanmill.export.stored_layer import StoredLayer
from leanmill.models.offloading import Held
from leanmill.models.pretrained import one_line, quiet_transformers


@dataclass
class Generated:
    """What one model added to a prompt, and how long it took."""

    token_ids: list[int] = field(default_factory=list)
    """Without the prompt's."""
    prompt_seconds: float = 0.0
    """Of the prompt's forward, which gives the first token."""
    seconds: list[float] = field(default_factory=list)
    """Of each token after the first."""

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None if there are none."""
        return len(self.seconds) / sum(self.seconds) if self.seconds else None


class Continuation:
    """A prompt that one model continues, a token a step.

    Args:
        model: A causal LM of transformers, in eval mode on the CPU; packed layers may stand in it.
        prompt_ids: int64 [tokens], at least one.
        temperature: Logits are divided by it before a token is drawn; 0 takes the likeliest.
        seed: Of the draws.
    """

    def __init__(self, model: Any, prompt_ids: Tensor, *, temperature: float = 0.0, seed: int = 0) -> None:
        self.model, self.temperature = model, temperature
        self.generated = Generated()
        self._next = prompt_ids.view(1, -1)
        self._cache: Any = None
        self._random = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def step(self) -> int:
        """Add one token and return it."""
        started = time.perf_counter()
        out = self.model(input_ids=self._next, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        token = self._chosen(out.logits[0, -1].float())
        self._next = torch.tensor([[token]])
        seconds = time.perf_counter() - started
        if self.generated.token_ids:
            self.generated.seconds.append(seconds)
        else:
            self.generated.prompt_seconds = seconds
        self.generated.token_ids.append(token)
        return token

    def _chosen(self, logits: Tensor) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        probabilities = (logits / self.temperature).softmax(-1)
        return int(torch.multinomial(probabilities, 1, generator=self._random))


def generate(continuations: Sequence[Continuation], *, max_new_tokens: int, stops: frozenset[int]) -> None:
    """Let each continuation add tokens in turn, so that a load of the machine meets all alike.

    Args:
        continuations: Of one prompt by several models, or one.
        max_new_tokens: The most tokens each adds.
        stops: Tokens that end a continuation.
    """
    going = list(continuations)
    for _ in range(max_new_tokens):
        going = [one for one in going if one.step() not in stops]


def open_model(folder: Path, *, weights_gib: float | None = None) -> Any:
    """Return a model to generate with.

    A folder of packed layers keeps them packed and the rest in fp32; any other is loaded by transformers in the dtype
    that it has.

    Args:
        folder: Local.
        weights_gib: The most of its weights that is held, see `leanmill.models.offloading`; None holds all.

    Raises:
        ConfigError: There is no model in `folder`, or it is packed and only a part of it is to be held.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give one that `leanmill export` wrote")
    is_packed = (folder / LAYERS).is_file()
    if is_packed and weights_gib is not None:
        raise ConfigError(f"{folder} holds packed weights, which stay in memory as they are; leave --weights-gib out")
    model = load(folder) if is_packed else _load_plain(folder, weights_gib)
    return model.requires_grad_(False)


def _load_plain(folder: Path, weights_gib: float | None) -> Any:
    from transformers import AutoModelForCausalLM

    import leanmill.models.own_families  # noqa: F401

    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} holds no config.json, so it is no exported model; of a run, type first leanmill export "
            f"--checkpoint {folder} --to hf --out DIR, and give DIR"
        )
    held = {} if weights_gib is None else Held(weights_gib, torch.device("cpu")).options()
    try:
        with quiet_transformers():
            found = AutoModelForCausalLM.from_pretrained(str(folder), use_safetensors=True, dtype="auto", **held)
            return found.eval()
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{folder} cannot be loaded: {one_line(error)}") from error


def open_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of an exported folder.

    Raises:
        ConfigError: It holds none.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise ConfigError(
            f"{folder} holds no tokenizer, so there is no text to read or write; export from a checkpoint inside its "
            f"run folder, which has one"
        )
    return AutoTokenizer.from_pretrained(str(folder))


def prompt_ids(tokenizer: Any, text: str, *, room: int | None) -> Tensor:
    """Return the tokens of a prompt, int64 [tokens].

    Args:
        tokenizer: Of the folder.
        text: The prompt.
        room: The most tokens that the prompt and what follows may take; None is any.

    Raises:
        ConfigError: There are none, or too many.
    """
    ids = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
    if not ids.numel():
        raise ConfigError("the prompt is empty; give some text to continue: --prompt 'Once upon a time'")
    if room is not None and ids.numel() > room:
        raise ConfigError(
            f"the prompt has {ids.numel()} tokens and leaves no room in the model's context; shorten it, or lower "
            f"--max-new-tokens"
        )
    return ids


def stop_tokens(model: Any) -> frozenset[int]:
    """Return the tokens that end a text."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list) else [ends])


def plain_bf16(folder: Path) -> Any:
    """Return the model of a folder with every weight in bf16, packed ones as what their codes stand for.

    Raises:
        ConfigError: See `open_model`.
    """
    model = open_model(folder)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{folder} is packed in a form that only transformers unpacks; leave out --beside-bf16, or export with "
            f"--to packed"
        )
    for path, layer in list(_stored(model)):
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.plain(torch.bfloat16))
    return _without_copies(model.to(torch.bfloat16))


def _stored(model: nn.Module) -> Iterator[tuple[str, StoredLayer]]:
    for path, module in model.named_modules():
        if isinstance(module, StoredLayer):
            yield path, module


def _without_copies(model: Any) -> Any:
    """Let a head that equals the table of inputs be it again."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight.shape == table.weight.shape and torch.equal(head.weight, table.weight):
        head.weight = table.weight
        model.config.tie_word_embeddings = True
    return model
