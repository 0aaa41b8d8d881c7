"""What can go wrong between us and the Hugging Face hub, as one line each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from leanmill.core.errors import ConfigError, RunError


_NOT_ANSWERING = (
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "TimeoutException",
    "Timeout",
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "ProxyError",
    "NetworkError",
    "TransportError",
    "HfHubHTTPError",
)
_NOT_THERE = ("RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError", "GatedRepoError")


@contextmanager
def hub_errors(field: str, name: str, local: str) -> Iterator[None]:
    """Turn the many exceptions of a hub lookup into ConfigError or RunError.

    Args:
        field: Recipe field that named the thing.
        name: What it named.
        local: What to give instead where there is no network, e.g. `a local folder`.
    """
    try:
        yield
    except (ConfigError, RunError):
        raise
    except Exception as error:
        names = [kind.__name__ for e in _chain(error) for kind in type(e).__mro__]
        messages = " ".join(str(e) for e in _chain(error))
        if any(kind in names for kind in _NOT_THERE):
            raise ConfigError(
                f"{field}: the hub has no public {name!r}; check the name, log in with `hf auth login` if it is "
                f"private or gated, or give {local}"
            ) from error
        if any(kind in names for kind in _NOT_ANSWERING) or "couldn't connect" in messages.lower():
            raise RunError(
                f"{field}: {name!r} is not on this machine and the Hugging Face hub does not answer; check the "
                f"network and HF_ENDPOINT, or give {local}"
            ) from error
        if "script" in messages.lower() or "trust_remote_code" in messages:
            raise ConfigError(
                f"{field}: {name!r} needs its own code to load, which is never run; convert it to Parquet or JSONL "
                f"and give the files"
            ) from error
        raise ConfigError(f"{field}: cannot load {name!r}: {one_line(error)}; give {local}") from error


def one_line(error: BaseException) -> str:
    """First line of an exception's message, with its type where the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else type(error).__name__


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
