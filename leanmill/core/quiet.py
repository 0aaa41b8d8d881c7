"""What other libraries say that nobody here can act on: one table, kept back line by line.

Everything else they say is shown. A line belongs here only if it is about what this project asks for
on purpose, or about something that a user of it neither chose nor can change.
"""

from __future__ import annotations

import logging
import re
import warnings


_LOG_LINES = {
    # transformers imports torchao wherever it is installed; that names kernels it was not built for ...
    "torchao": re.compile(r"Failed to load .*\.so"),
    # ... and registers two enums in a way that torch has since made needless.
    "torch.utils._pytree": re.compile(r".*is an Enum subclass and is now natively supported"),
    # transformers imports DeepSpeed too, which finds no GPU on a machine that has none.
    "DeepSpeed": re.compile(r"Setting accelerator to CPU\."),
}
"""By logger, the start of the lines."""


def quiet_libraries() -> None:
    """Keep back the lines of the table from now on. Imports none of the libraries; may be called again."""
    for name, line in _LOG_LINES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Drop) for known in logger.filters):
            logger.addFilter(_Drop(line))


def ignore_warning(message: str, category: type[Warning] = Warning) -> None:
    """Ignore warnings whose text starts with the pattern `message`.

    Unlike `warnings.filterwarnings` this changes nothing when called again: every change of the filters
    makes Python forget which warnings it has shown already, and show all of them once more.
    """
    pattern = re.compile(message, re.IGNORECASE)
    if not any(known[:3] == ("ignore", pattern, category) for known in warnings.filters):
        warnings.filterwarnings("ignore", message=message, category=category)


class _Drop(logging.Filter):
    def __init__(self, line: re.Pattern[str]) -> None:
        super().__init__()
        self.line = line

    def filter(self, record: logging.LogRecord) -> bool:
        return self.line.match(record.getMessage()) is None
