"""Hooks that tell a timeline which module computes, forward and backward, and what each keeps in between.

Backward is followed by hooks on the graph: where the node that made a module's output begins, that module begins.
Nothing is wrapped and no gradient goes another way. What lies between modules (attention's products, residuals) is
its caller's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.names import clean_name
from leanmill.parallel.tensors import local
from leanmill.trainer.profile.timeline import Owner, Timeline


class ModuleHooks:
    """Follows the calls of every module of a model.

    Args:
        root: The train module.
        timeline: What is told.
    """

    def __init__(self, root: nn.Module, timeline: Timeline) -> None:
        self._timeline = timeline
        self._callers: list[str] = []
        self._made: dict[int, Any] = {}  # nodes that are some module's output; kept, so that ids stay theirs
        self.kept: dict[str, int] = defaultdict(int)
        """Bytes kept for backward, by the path of the module that was being called."""
        self._counts = False
        self._modules = {clean_name(name): module for name, module in root.named_modules()}
        self._handles = []
        for name, module in root.named_modules():
            path = clean_name(name)
            # Paths are bound here: modules may be called under several parents, and know no name.
            self._handles += [
                module.register_forward_pre_hook(self._before(path), with_kwargs=True, prepend=True),
                # A recomputation ends by an exception once it has all that backward needs.
                module.register_forward_hook(self._after(path), always_call=True),
            ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def forget_step(self) -> None:
        """Drop what was remembered of a step's graph."""
        self._made.clear()

    def _before(self, path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _is_backward():
                self._timeline.enter(Owner(path, "recomputation"))
                return
            self._come_back(args, kwargs)
            self._callers.append(path)
            self._timeline.enter(Owner(path, "forward"))

        return hook

    def _after(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self._timeline.leave()
            if _is_backward():
                return
            self._callers.pop()
            for tensor in _tensors(output):
                node = tensor.grad_fn
                # A caller that returns what it was given back adds nothing of its own.
                if node is not None and id(node) not in self._made:
                    self._made[id(node)] = node
                    node.register_prehook(self._beginning(path))

        return hook

    def _come_back(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give the time back to the caller once backward has gone through the module that is about to be called."""
        caller = self._callers[-1] if self._callers else ""
        for tensor in _tensors((args, kwargs)):
            node = tensor.grad_fn
            # What another module made begins with that one's own hook.
            if node is not None and id(node) not in self._made:
                node.register_prehook(self._beginning(caller))

    def _beginning(self, path: str) -> Any:
        owner = Owner(path, "backward")

        def hook(*_: Any) -> None:
            self._timeline.begin(owner)

        return hook

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is kept for backward inside; each storage once, for the module that kept it first.

        A module's own weights are left out, gathered ones too; what autocast makes of them is not.
        """
        seen: dict[int, Any] = {}  # with the storage, whose address so stays taken

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            path = self._callers[-1] if self._callers else ""
            if storage.data_ptr() not in seen and not _is_backward() and not self._is_weight(path, storage):
                seen[storage.data_ptr()] = storage
                self.kept[path] += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def _is_weight(self, path: str, storage: torch.UntypedStorage) -> bool:
        own = self._modules[path]._parameters.values()
        return any(p is not None and local(p).untyped_storage().data_ptr() == storage.data_ptr() for p in own)


def _is_backward() -> bool:
    """Whether autograd is running: then a forward is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
