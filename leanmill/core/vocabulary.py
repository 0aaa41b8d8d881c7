"""Whether a frozen model and the student speak of the same tokens."""

from __future__ import annotations

from leanmill.core.errors import ConfigError
from leanmill.core.technique import InstallContext


def check_vocabulary(context: InstallContext, path: str, size: int, *, role: str) -> None:
    """Compare a frozen model's vocabulary with the student's.

    Sizes may differ by padding, which no token uses: then both must have the same tokenizer.

    Args:
        context: Knows the student's vocabulary and tokenizer.
        path: Folder or hub name of the frozen model.
        size: Its vocabulary.
        role: What the technique calls it.

    Raises:
        ConfigError: The two are not known to agree.
    """
    if size != context.vocab_size and not _same_tokenizer(context, path):
        raise ConfigError(
            f"{role} {path} has a vocabulary of {size} and the student one of {context.vocab_size}, and "
            f"their tokenizers are not known to agree; set data.tokenizer.path: {path} and "
            f"model.config.vocab_size: {size}, or choose a {role} with the student's tokenizer"
        )


def _same_tokenizer(context: InstallContext, path: str) -> bool:
    mine, fingerprint_of = context.tokenizer_fingerprint, context.fingerprint_of_tokenizer
    return mine is not None and fingerprint_of is not None and fingerprint_of(path) == mine
