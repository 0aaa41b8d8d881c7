"""Names of parameters as states, checkpoints and users know them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from leanmill.core.names import state_name


def state_parameters(model: nn.Module, *, aliases: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of `model`.

    Args:
        model: The causal LM.
        aliases: Yield a tied parameter under each of its names instead of only the first.
    """
    for path, parameter in model.named_parameters(remove_duplicate=not aliases):
        yield state_name(path), parameter


def state_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, buffer) of the buffers that belong into a checkpoint."""
    for path, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield state_name(f"{path}.{key}" if path else key), buffer
