"""The weights of a checkpoint of the plain model: read by one rank, handed to all."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.core.errors import ConfigError, RunError
from leanmill.models.config import ModelConfig
from leanmill.models.pretrained import load_weights
from leanmill.parallel.collectives import broadcast_object


class StoredWeights:
    """Reads a checkpoint at the first `take`, on rank 0, and frees every weight that was taken.

    Args:
        config: With the `path` to read.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._weights: dict[str, Tensor] | None = None

    def take(self, name: str, like: Tensor) -> Tensor:
        """Return a weight, whole, on every rank. A collective.

        Args:
            name: Dotted name in the plain model; each can be taken once.
            like: Tells shape and dtype.

        Raises:
            ConfigError: The checkpoint cannot be read, lacks the weight, or has it in another shape.
            RunError: The hub cannot be reached.
        """
        if self._weights is None:
            self._weights = self._read()
        return self._broadcast(self._weights.pop(name, None), like, name)

    def close(self) -> None:
        """Forget what was not taken."""
        self._weights = {}

    def _read(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        problem: dict[str, str] = {}
        if not dist.is_initialized() or dist.get_rank() == 0:
            try:
                weights = _tensors_of(self.config)
            except (ConfigError, RunError) as error:
                problem = {"kind": type(error).__name__, "message": str(error)}
        problem = broadcast_object(problem)
        if problem:
            raise (ConfigError if problem["kind"] == "ConfigError" else RunError)(problem["message"])
        return weights

    def _broadcast(self, value: Tensor | None, like: Tensor, name: str) -> Tensor:
        is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        if (is_alone or dist.get_rank() == 0) and (value is None or value.shape != like.shape):
            holds = f"no {name}" if value is None else f"{name} {list(value.shape)}"
            raise ConfigError(
                f"{self.config.path} holds {holds}, and the model has it {list(like.shape)}; give a checkpoint of this "
                f"very model, complete"
            )
        if is_alone:
            assert value is not None
            return value
        device = (
            torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
        )
        whole = torch.empty(like.shape, dtype=like.dtype, device=device)
        if value is not None:
            whole.copy_(value)
        dist.broadcast(whole, src=0)
        return whole


def _tensors_of(config: ModelConfig) -> dict[str, Tensor]:
    model = load_weights(config, dtype=torch.float32)
    state = dict(model.named_parameters(remove_duplicate=False))
    persistent = set(model.state_dict())
    state |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {name: tensor.detach() for name, tensor in state.items()}
