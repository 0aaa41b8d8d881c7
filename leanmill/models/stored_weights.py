"""The weights of a checkpoint of the plain model: each rank reads its part, or one reads and hands to all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from leanmill.core.compact import CodedWeight
from leanmill.core.errors import ConfigError, RunError
from leanmill.models.config import ModelConfig
from leanmill.models.folder_weights import FolderWeights
from leanmill.models.pretrained import load_weights
from leanmill.parallel.collectives import (
    broadcast_object,
    collective_device,
    is_alone,
    is_first_rank,
    same_on_all_ranks,
)
from leanmill.parallel.tensors import assign, local, write_part


class StoredWeights:
    """Opens a checkpoint at the first use and reads one weight at a time.

    What a rank holds a part of (its rows, its experts) it reads itself, and no more, where every rank sees the
    folder. What all hold is read by rank 0 and broadcast. A folder that only transformers can read, since names
    or layout of its family take more than renaming and stacking, is loaded whole by rank 0, and every weight
    freed that was taken.

    Args:
        config: With the `path` to read.
        in_parts: Whether ranks fill different parts of the model: then each reads what it holds, whole ones too.
    """

    def __init__(self, config: ModelConfig, *, in_parts: bool = False) -> None:
        self.config, self._in_parts = config, in_parts
        self._is_open = self._everyone_reads = False
        self._folder: FolderWeights | None = None
        self._weights: dict[str, Tensor] = {}

    def fill(self, name: str, tensor: Tensor, compact: CodedWeight | None = None) -> None:
        """Write a weight into `tensor`, which may be sharded. A collective.

        Args:
            name: Dotted name in the plain model; each can be read once.
            tensor: Of the weight's shape, any dtype; or its codes.
            compact: What decodes the codes, whose scales are written too.

        Raises:
            ConfigError: The checkpoint cannot be read, lacks weights, or has this one in another shape.
            RunError: The hub cannot be reached.
        """
        self._open()
        folder = self._folder
        if self._in_parts and (folder is None or not self._everyone_reads):
            raise ConfigError(
                f"layout.pp has each rank read its own blocks of {self.config.path}, and not every rank sees this "
                f"folder, or it holds other than plain safetensors of this family; put it where all ranks see it, "
                f"or set layout.pp=1"
            )
        like = tensor if compact is None else torch.empty(compact.shape, dtype=torch.float32, device="meta")
        is_own = self._in_parts or isinstance(tensor, DTensor)
        if folder is None or not self._everyone_reads or not is_own:
            value = self.take(name, like)
            if compact is None:
                assign(tensor, value)
            else:
                compact.assign_encoded(tensor, value, assign)
            return
        source = folder.sources.get(name)
        if source is None or source.shape != tuple(like.shape):
            raise ConfigError(self._unlike(name, like, None if source is None else list(source.shape)))

        def read(part: Tensor, offsets: Sequence[int]) -> None:
            if compact is None:
                folder.read_into(part, name, offsets)
                return
            rows = torch.empty(*part.shape[:-1], compact.shape[-1])
            folder.read_into(rows, name, offsets)
            codes, scales = compact.encode(rows)
            part.copy_(codes)
            local(compact.scale).copy_(scales)

        if isinstance(tensor, DTensor):
            write_part(tensor, read)
        else:
            read(tensor, [0] * tensor.dim())

    def take(self, name: str, like: Tensor) -> Tensor:
        """Return a weight, whole, on every rank. A collective.

        Args:
            name: Dotted name in the plain model; each can be read once.
            like: Tells shape and dtype.

        Raises:
            ConfigError, RunError: See `fill`.
        """
        self._open()
        folder, value = self._folder, self._weights.pop(name, None)
        if folder is None:
            return self._broadcast(value, like, name)
        source = folder.sources.get(name)
        if is_first_rank() and (source is None or source.shape != tuple(like.shape)):
            raise ConfigError(self._unlike(name, like, None if source is None else list(source.shape)))
        if is_first_rank():
            value = torch.empty(like.shape, dtype=like.dtype)
            folder.read_into(value, name)
        return self._broadcast(value, like, name)

    def close(self) -> None:
        """Forget what was not taken."""
        self._is_open, self._folder, self._weights = True, None, {}

    def _open(self) -> None:
        """Agree on who reads what. A collective, once."""
        if self._is_open:
            return
        self._is_open = True
        problem: dict[str, str] = {}
        if is_first_rank():
            try:
                self._folder = FolderWeights.open(self.config, downloads=True)
                if self._folder is None:
                    self._weights = _tensors_of(self.config)
            except (ConfigError, RunError) as error:
                problem = {"kind": type(error).__name__, "message": str(error)}
        told = broadcast_object({"problem": problem, "is_folder": self._folder is not None})
        if problem := told["problem"]:
            raise (ConfigError if problem["kind"] == "ConfigError" else RunError)(problem["message"])
        if told["is_folder"]:
            if not is_first_rank():
                self._folder = self._seen_here()
            identity = None if self._folder is None else self._folder.identity
            self._everyone_reads = same_on_all_ranks(identity)

    def _seen_here(self) -> FolderWeights | None:
        """Open the folder where this rank has it too; on another machine it may be missing."""
        try:
            return FolderWeights.open(self.config, downloads=False)
        except (ConfigError, RunError, OSError):
            return None

    def _unlike(self, name: str, like: Tensor, shape: list[int] | None) -> str:
        holds = f"no {name}" if shape is None else f"{name} {shape}"
        return (
            f"{self.config.path} holds {holds}, and the model has it {list(like.shape)}; give a checkpoint of this "
            f"very model, complete"
        )

    def _broadcast(self, value: Tensor | None, like: Tensor, name: str) -> Tensor:
        if is_first_rank() and (value is None or value.shape != like.shape):
            raise ConfigError(self._unlike(name, like, None if value is None else list(value.shape)))
        if is_alone():
            assert value is not None
            return value
        device = collective_device()
        if value is None:
            value = torch.empty(like.shape, dtype=like.dtype, device=device)
        value = value.to(device, like.dtype).contiguous()
        dist.broadcast(value, src=0)
        return value


def _tensors_of(config: ModelConfig) -> dict[str, Tensor]:
    model = load_weights(config, dtype=torch.float32)
    state = dict(model.named_parameters(remove_duplicate=False))
    persistent = set(model.state_dict())
    state |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {name: tensor.detach() for name, tensor in state.items()}
