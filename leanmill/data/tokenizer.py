"""Tokenizers: from Hugging Face, or byte-level BPE trained once on the data and cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.paths import expand_user
from leanmill.data.cache import cached_folder, fingerprint
from leanmill.data.config import TokenizerConfig
from leanmill.data.hub import hub_errors


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"
ENCODER_TOKENS = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
"""What frames and hides text of an encoder; a trained tokenizer numbers them from 0."""
SPECIAL_TOKENS = (END_OF_TEXT, "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role'] + '; roles are system, user and assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_VERSION = 1
"""Raise when the same text would train another tokenizer."""


def load_tokenizer(path: str, *, trust_remote_code: bool = False, for_encoder: bool = False) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a local folder or the hub.

    Args:
        path: Folder or hub name.
        trust_remote_code: Run Python code that comes with it; without, such a tokenizer is refused.
        for_encoder: Whether it must have the tokens that frame and hide text, rather than one that ends it.

    Raises:
        ConfigError: There is none under that name, it has no fast version, or lacks such a token.
        RunError: The hub does not answer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if _looks_local(path) and not expand_user(path).exists():
        raise ConfigError(f"data.tokenizer.path: no folder {path!r}; give a local folder, a hub name, or leave it out")
    location = str(expand_user(path)) if expand_user(path).exists() else path
    with hub_errors("data.tokenizer.path", path, "a local folder with tokenizer.json"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ConfigError(
                f"data.tokenizer.path: {path!r} comes with Python code of its own, which is not run unasked; read it "
                f"and set data.tokenizer.trust_remote_code=true, or give a tokenizer without own code"
            ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
        raise ConfigError(
            f"data.tokenizer.path: {path!r} has no fast tokenizer; give a folder that contains tokenizer.json"
        )
    missing = [name for name in ENCODER_TOKENS if for_encoder and getattr(tokenizer, f"{name}_id") is None]
    if missing:
        raise ConfigError(
            f"data.tokenizer.path: {path!r} has no {missing[0]}, which encoders need; set it in its "
            f"tokenizer_config.json, or give the tokenizer of an encoder, such as that of bert-base-uncased"
        )
    if tokenizer.eos_token_id is None and not for_encoder:
        raise ConfigError(
            f"data.tokenizer.path: {path!r} has no eos token, which separates documents; set eos_token in its "
            f"tokenizer_config.json"
        )
    return tokenizer  # type: ignore[return-value]


def with_chat_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    """Give a tokenizer another chat template: its Jinja text, or a file that holds it; None changes nothing.

    Raises:
        ConfigError: There is no such file, or it is not UTF-8.
    """
    if template is None:
        return tokenizer
    if "{" not in template:
        try:
            template = expand_user(template).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"data.tokenizer.chat_template: {template!r} is no file that can be read ({error.strerror}) and no "
                f"Jinja text; give one of the two"
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"data.tokenizer.chat_template: {template!r} is not UTF-8 at byte {error.start:,}; save it as UTF-8"
            ) from error
    tokenizer.chat_template = template
    return tokenizer


def _looks_local(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1


def trained_tokenizer(
    config: TokenizerConfig,
    *,
    text_key: str,
    texts: Callable[[], Iterable[str]],
    root: Path,
    for_encoder: bool = False,
) -> PreTrainedTokenizerFast:
    """Return the byte-level BPE fitted on `texts`, training it where it is not cached.

    Args:
        config: Vocabulary and how much text to read.
        text_key: Fingerprint of the text.
        texts: Opens the text in a fixed order; called only when training is needed.
        root: Folder of all caches.
        for_encoder: Whether its special tokens are those of an encoder, rather than of a causal LM.
    """
    from transformers import PreTrainedTokenizerFast

    special = [ENCODER_TOKENS] if for_encoder else [SPECIAL_TOKENS, CHAT_TEMPLATE]
    settings = [_VERSION, config.vocab_size, config.num_training_bytes, *special, text_key]
    folder = cached_folder(
        root, "tokenizer", fingerprint(settings), lambda path: _train(config, texts, path, for_encoder)
    )
    return PreTrainedTokenizerFast.from_pretrained(str(folder))  # type: ignore[no-any-return]


def _train(config: TokenizerConfig, texts: Callable[[], Iterable[str]], folder: Path, for_encoder: bool) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(ENCODER_TOKENS.values() if for_encoder else SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_first_bytes(texts(), config.num_training_bytes), trainer=trainer)
    tokenizer = _framing(bpe) if for_encoder else _chatting(bpe)
    tokenizer.save_pretrained(str(folder))


def _chatting(bpe: Any) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _framing(bpe: Any) -> PreTrainedTokenizerFast:
    """`[CLS] text [SEP]`, also for whoever loads it without Leanmill."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    ids = [(token, bpe.token_to_id(token)) for token in (ENCODER_TOKENS["cls_token"], ENCODER_TOKENS["sep_token"])]
    bpe.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **ENCODER_TOKENS)


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    left = limit
    for text in texts:
        if left <= 0:
            return
        # A character has at least one byte, so the cut reads at most `limit` characters.
        yield text[:left]
        left -= len(text.encode())


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash what decides which ids a text gets: the tokenizer's own file, special tokens, template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Padding and truncation are state that calls leave behind, not part of what the tokenizer is.
    backend["padding"] = backend["truncation"] = None
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.chat_template]
    text = json.dumps([backend, special], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def other_tokens(tokenizer: PreTrainedTokenizerFast, path: str, *, for_encoder: bool = False) -> str | None:
    """Say which token of `tokenizer` is another one, or none, in the tokenizer of a folder or hub repository.

    Returns:
        The first difference by number; "" where it has all of them, and maybe more; None where there is no tokenizer.
    """
    try:
        theirs = {number: token for token, number in load_tokenizer(path, for_encoder=for_encoder).get_vocab().items()}
    except (ConfigError, RunError):
        return None
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        if theirs.get(number) != token:
            other = repr(theirs[number]) if number in theirs else "no token"
            return f"number {number} is {token!r} in its tokenizer and {other} in that of {path}"
    return ""
