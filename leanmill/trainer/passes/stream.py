"""The blocks of a causal LM one after another, with what flows between them on calibration text."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leanmill.core.blocks import decoder_blocks
from leanmill.core.errors import ConfigError, RunError
from leanmill.core.stored_experts import STORED_EXPERTS
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.materialise import draw
from leanmill.trainer.passes.experts import module_names, stacked
from leanmill.trainer.passes.folder import SourceFolder
from leanmill.trainer.passes.memory import give_back


@dataclass(frozen=True, kw_only=True)
class Block:
    """One decoder block with its weights in memory."""

    index: int
    prefix: str
    """Of its tensors' names, with the dot."""
    module: nn.Module


class BlockStream:
    """Runs calibration rows through a model of which one block at a time is in memory.

    Hidden states wait on the CPU between blocks. What a block is called with besides them (masks,
    rotary embeddings) comes from one pass of the model's own forward over stand-ins for its blocks.

    Args:
        source: The model's folder.
        config: Names that folder.
        batches: Calibration rows, each `input_ids` and `position_ids` [B, S] int64.
        device: Where blocks compute.
        dtype: What they compute in.

    Raises:
        ConfigError: The family stores its weights under other names than its modules have.
    """

    def __init__(
        self,
        source: SourceFolder,
        config: ModelConfig,
        batches: Sequence[Mapping[str, Tensor]],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.source, self.config, self.rows = source, config, batches
        self.device, self.dtype = device, dtype
        self.model = build_on_meta(config, packed=False).eval()
        self._blocks = decoder_blocks(self.model)
        names = {id(module): name for name, module in self.model.named_modules()}
        self._prefixes = [f"{names[id(block)]}." for block in self._blocks]
        self._stored = STORED_EXPERTS.get(self.model.config.model_type)
        self._check_names()
        self.hidden: list[Tensor] = []
        """Input of the next block, one [B, S, H] a batch, on the CPU."""
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._start(batches)

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def prefixes(self) -> list[str]:
        """Of the names of each block's tensors, with the dot."""
        return list(self._prefixes)

    @property
    def other_names(self) -> list[str]:
        """Names of the tensors that lie in no block."""
        return sorted(name for name in self.source.keys if not name.startswith(tuple(self._prefixes)))

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linear layers of a block by their full name; their weights may be on the meta device."""
        prefix = self._prefixes[index]
        named = self._blocks[index].named_modules()
        return {prefix + name: module for name, module in named if isinstance(module, nn.Linear)}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear layer of a block, by its full name."""
        return {
            name: (layer.out_features, layer.in_features)
            for index in range(len(self))
            for name, layer in self.linears(index).items()
        }

    def prefix(self, index: int) -> str:
        """What the names of a block's tensors begin with, the dot included."""
        return self._prefixes[index]

    def blocks(self) -> Iterator[Block]:
        """Yield each block with its weights; its memory is given back when the next one is asked for."""
        for index in range(len(self)):
            block = self.open(index)
            yield block
            self.close(block)

    def open(self, index: int) -> Block:
        """Return a block with its weights, which stay in memory until `close`."""
        module, prefix = self._blocks[index], self._prefixes[index]
        self._load(module, prefix)
        module.to(self.device, self.dtype).requires_grad_(False)
        return Block(index=index, prefix=prefix, module=module)

    def close(self, block: Block) -> None:
        """Give back a block's memory."""
        block.module.to("meta")
        give_back()

    def _load(self, module: nn.Module, prefix: str) -> None:
        tensors = self.source.read(name for name in self.source.keys if name.startswith(prefix))
        state = stacked({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, self._stored)
        module.load_state_dict(state, strict=True, assign=True)

    @torch.no_grad()
    def run(self, block: Block, hidden: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        """Yield the block's output for each batch.

        Args:
            block: One of `blocks`.
            hidden: Its inputs; None is what the blocks before it made.
        """
        for number, inputs in enumerate(self.hidden if hidden is None else hidden):
            yield self.call(block, number, inputs).cpu()

    def call(self, block: Block, number: int, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the block's output [B, S, H] for one batch, where it computes.

        Args:
            block: One that is open.
            number: Of the batch.
            hidden: Its inputs [B, S, H].
            weights: Some to compute with in the place of the block's own, by their name in it.
        """
        args, kwargs = _to(self._calls[number][block.index], self.device, self.dtype)
        cast = {name: weight.to(self.dtype) for name, weight in (weights or {}).items()}
        out = functional_call(block.module, cast, (hidden.to(self.device, self.dtype), *args), kwargs)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found

    def weight(self, name: str) -> Tensor:
        """Return the weight of a layer as it is stored, fp32 on the CPU, in memory of its own.

        Raises:
            RunError: Some of it is no number. Selections by rank would leave just that out, and say nothing.
        """
        key = f"{name}.weight"
        weight = self.source.read([key])[key].float()
        if weight.numel() and not all(map(math.isfinite, map(float, weight.aminmax()))):
            raise RunError(
                f"{key} in {self.source.path} holds what is not finite; give a checkpoint from before the run diverged"
            )
        return weight

    def drop(self, layer: nn.Linear) -> None:
        """Give back the memory of a layer's weight, until `put`."""
        layer.weight = nn.Parameter(torch.empty_like(layer.weight, device="meta"), requires_grad=False)

    def put(self, layer: nn.Linear, weight: Tensor) -> None:
        """Give a layer another weight [out, in]."""
        layer.weight = nn.Parameter(weight.to(self.device, self.dtype), requires_grad=False)

    def advance(self, block: Block) -> None:
        """Make the block's outputs, as its weights are now, the next one's inputs."""
        for index, out in enumerate(self.run(block)):
            self.hidden[index] = out

    def _check_names(self) -> None:
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        wanted = {name for name in self.model.state_dict() if name not in tied}
        lacking = sorted(wanted - self._names_of_modules())
        if lacking:
            family = self.model.config.model_type
            raise ConfigError(
                f"{self.source.path} stores weights under other names than the modules of {family} "
                f"have ({lacking[0]} is not there), so it cannot be streamed a block at a time; passes cover families "
                f"with plain names, such as Llama, Qwen3 or Gemma, and the mixtures {', '.join(STORED_EXPERTS)}"
            )

    def _names_of_modules(self) -> set[str]:
        found = set(self.other_names)
        for prefix in self._prefixes:
            here = [name.removeprefix(prefix) for name in self.source.keys if name.startswith(prefix)]
            found |= {f"{prefix}{name}" for name in module_names(here, self._stored)}
        return found

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor, Mapping[str, Tensor]], Tensor]]:
        """Yield what makes logits [B, S, V], in fp32, of the last block's output [B, S, H] and its batch."""
        recorders = [_Recorder(block) for block in self._blocks]
        self.model.tie_weights()  # the rows have been embedded since, by a module that was filled alone
        model = copy.copy(self.model)
        model._modules = dict(model._modules)
        base = self._shell(recorders)
        key = next(key for key, child in model._modules.items() if child is self.model.base_model)
        model._modules[key] = base
        _fill(model, "", self.source, self.dtype)
        model.to(self.device)

        @torch.no_grad()
        def logits(hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
            recorders[0].instead = hidden.to(self.device, self.dtype)
            inputs = {name: batch[name].to(self.device) for name in ("input_ids", "position_ids")}
            found: Tensor = model(**inputs, use_cache=False).logits
            return found.float()

        yield logits
        model.to("meta")
        give_back()

    def _shell(self, recorders: Sequence[nn.Module]) -> Any:
        """The model below its head, with other modules in place of its blocks."""
        base = copy.copy(self.model.base_model)
        base._modules = dict(base._modules)
        lists = {key: child for key, child in base._modules.items() if isinstance(child, nn.ModuleList)}
        key = next(key for key, child in lists.items() if child[0] is self._blocks[0])
        base._modules[key] = nn.ModuleList(recorders)
        return base

    @torch.no_grad()
    def _start(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Embed the rows and record how each block is called."""
        recorders = [_Recorder(block) for block in self._blocks]
        base = self._shell(recorders)
        prefix = next(f"{name}." for name, module in self.model.named_modules() if module is self.model.base_model)
        _fill(base, prefix, self.source, self.dtype)
        for batch in batches:
            base(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
            self.hidden.append(recorders[0].hidden)
            self._calls.append([recorder.take() for recorder in recorders])
        base.to("meta")
        give_back()


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it is called with and hands its input on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Models read a block's own settings (its kind of attention) before they call it.
        self.__dict__["_block"] = block
        self.hidden = torch.empty(0)
        self.instead: Tensor | None = None
        """What is handed on in place of the input."""
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self._call = hidden, (args, kwargs)
        return hidden if self.instead is None else self.instead

    def take(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the last call's arguments besides the hidden states."""
        return self._call


def _fill(module: nn.Module, prefix: str, source: SourceFolder, dtype: torch.dtype) -> None:
    """Give what is left of a model storage: weights from the folder, tables of the family's own making."""
    names = [name for name, _ in module.named_parameters()]
    draw(module, seed=0)
    tensors = source.read(f"{prefix}{name}" for name in names)
    for name, parameter in module.named_parameters():
        parameter.data = tensors[f"{prefix}{name}"].to(dtype)


def _to(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move the tensors in nested arguments."""
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device, dtype) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device, dtype) for item in value)
    return value
