"""Names of parameters and modules, free of what wrappers insert into their paths."""

from __future__ import annotations

from leanmill.core.branches import BASE


WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Path components that compile, recomputation and sharding insert and that are never a name."""


def state_name(path: str) -> str:
    """Strip the components of wrappers: the name in states and checkpoints.

    An adapter's component stays: it is a part of the parameter's name in PEFT's own files.
    """
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def clean_name(path: str) -> str:
    """Strip the components of wrappers and adapters: the name in the plain model, which users know."""
    return ".".join(part for part in path.split(".") if part not in (*WRAPPERS, "module", BASE))
