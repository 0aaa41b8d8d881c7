"""Whether a frozen model and the student speak of the same tokens."""

from __future__ import annotations

from leanmill.core.errors import ConfigError
from leanmill.core.technique import InstallContext


def check_vocabulary(context: InstallContext, path: str, size: int, *, role: str) -> None:
    """Compare a frozen model's vocabulary with the student's.

    Where both have a tokenizer, every token of the student's must be the frozen model's of that number. Sizes may then
    differ, by padding or by tokens that the frozen model has beyond; without tokenizers they must be equal.

    Args:
        context: Knows the student's vocabulary and tokenizer.
        path: Folder or hub name of the frozen model.
        size: Its vocabulary.
        role: What the technique calls it.

    Raises:
        ConfigError: The two do not agree, or sizes differ and they are not known to.
    """
    difference = None if context.other_tokens is None else context.other_tokens(path)
    if difference:
        raise ConfigError(
            f"{role} {path} has other tokens than the student: {difference}; set data.tokenizer.path: {path}, or "
            f"choose a {role} with the student's tokenizer"
        )
    if size != context.vocab_size and difference is None:
        raise ConfigError(
            f"{role} {path} has a vocabulary of {size} and the student one of {context.vocab_size}, and "
            f"their tokenizers are not known to agree; set data.tokenizer.path: {path} and "
            f"model.config.vocab_size: {size}, or choose a {role} with the student's tokenizer"
        )
