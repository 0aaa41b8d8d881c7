"""SliceGPT's rotations, found in what the sliced model sees, and the model in their coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.errors import RunError
from leanmill.core.gram import Gram
from leanmill.core.llama_like import completed
from leanmill.core.surgery import CalibratedModel, LookingSurgeon, SeenBlock, StoredBlock
from leanmill.sparse.structured.anatomy import Sizes, check_hidden, sizes_of
from leanmill.sparse.structured.cut import smaller_config
from leanmill.sparse.structured.importance import NORMS
from leanmill.sparse.structured.targets import Targets
from leanmill.sparse.structured.widths import Widths, config_with, widths_of


@dataclass(frozen=True)
class _Plan:
    before: Any
    """transformers configuration of the model there is."""
    old: Sizes
    kept: int
    """Channels that stay."""


@dataclass(frozen=True)
class Rotations:
    """Of one block, each [H, kept] fp64: its columns are the principal components that stay."""

    entry: Tensor
    """Of what enters the block."""
    middle: Tensor
    """Of what enters its MLP."""
    leaving: Tensor
    """Of what leaves it: the next one's `entry`."""


class SliceGptSurgeon(LookingSurgeon):
    """Rotates and slices; see `SliceGpt`.

    Args:
        targets: Channels of the model to be.
        per_block: Whether each block has rotations of its own.
    """

    def __init__(self, targets: Targets, *, per_block: bool) -> None:
        self.targets, self.per_block = targets, per_block
        self._plan: _Plan | None = None
        self._after: Any = None
        self.rotations: list[Rotations] = []
        """Of each block."""

    @property
    def plan(self) -> _Plan:
        """What `config` found."""
        assert self._plan is not None
        return self._plan

    def config(self, before: Any) -> Any:
        old = sizes_of("slicegpt", before)
        check_hidden("slicegpt", before)
        kept = self.targets.size("hidden_size", old.hidden)
        self._plan = _Plan(before, old, kept)
        if self.per_block:
            widths_of("slicegpt", before)
            layers = range(old.layers)
            even = Widths(
                heads=[old.heads] * old.layers, groups=[old.groups] * old.layers, neurons=[old.neurons] * old.layers
            )
            after = config_with("slicegpt", before, even, layers, own=True)
            after.hidden_size, after.residual_rotations = kept, True
        else:
            after = smaller_config("slicegpt", before, replace(old, hidden=kept), range(old.layers))
        # Norms go on dividing by the root of the sum of squares over all channels there were.
        after.rms_norm_eps = before.rms_norm_eps * old.hidden / kept
        after.tie_word_embeddings = False
        self._after = after
        return after

    def look(self, model: CalibratedModel) -> Any:
        self.rotations = list(self._of_blocks(model) if self.per_block else self._shared(model))
        return self._after

    def _shared(self, model: CalibratedModel) -> Iterator[Rotations]:
        signal = self._signal()
        for block in model.blocks():
            with _inputs_of(block, NORMS, signal.see):
                for _, after in block.run():
                    if block.index == self.plan.old.layers - 1:
                        signal.see(after)
        found = signal.components(model, self.plan.kept)
        return iter([Rotations(found, found, found)] * self.plan.old.layers)

    def _of_blocks(self, model: CalibratedModel) -> Iterator[Rotations]:
        """Each rotation is that of what the model gives whose stream is sliced at all places before it."""
        entry: Tensor | None = None
        for block in model.blocks():
            if entry is None:
                embedded = self._signal()
                for before, _ in block.peek():
                    embedded.see(before)
                entry = embedded.components(model, self.plan.kept)
            between, outgoing = self._signal(), self._signal()
            with _sliced(block, entry, None), _inputs_of(block, NORMS[1:], between.see):
                for _ in block.peek():
                    pass
            middle = between.components(model, self.plan.kept)
            with _sliced(block, entry, middle):
                for _, after in block.run():
                    outgoing.see(after)
            after_it = outgoing.components(model, self.plan.kept)
            yield Rotations(entry, middle, after_it)
            entry = after_it

    def _signal(self) -> Signal:
        return Signal(self.plan.old.hidden, self.plan.before.rms_norm_eps)

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        return completed(self._after, self.plan.kept, self._rotated(block))

    def _rotated(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        turn = self.rotations[block.index]
        gains = {norm: block.read(f"{norm}.weight").double() for norm in NORMS}
        dtype = block.read("self_attn.q_proj.weight").dtype
        for name in sorted(block.names):
            tensor = block.read(name)
            found = _turned(name, tensor.double(), gains, turn)
            if name.removesuffix(".weight") in NORMS:
                found = self._norm(tensor)
            yield name, found.to(tensor.dtype).contiguous()
        if self.per_block:
            yield "attention_rotation.weight", (turn.middle.t() @ turn.entry).to(dtype)
            yield "mlp_rotation.weight", (turn.leaving.t() @ turn.middle).to(dtype)

    def _norm(self, weight: Tensor) -> Tensor:
        kept, old = self.plan.kept, self.plan.old.hidden
        return torch.full([kept], math.sqrt(old / kept), dtype=torch.float64).to(weight.dtype)

    def rest(self, names: Sequence[str], read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        embeddings, head, norm = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
        table, gain = read(embeddings), read(norm)
        yield embeddings, (table.double() @ self.rotations[0].entry).to(table.dtype)
        yield norm, self._norm(gain)
        # The head takes over the last norm's weights, which the embeddings have not, so they are tied no more.
        weight = read(head) if head in names else table
        yield head, ((weight.double() * gain.double()) @ self.rotations[-1].leaving).to(weight.dtype)
        yield from ((name, read(name)) for name in names if name not in (embeddings, head, norm))

    def describe(self) -> str:
        where = "before each attention and MLP" if self.per_block else "as a whole"
        return f"residual stream rotated {where}, {self.plan.old.hidden} channels cut to {self.plan.kept}"


class Signal:
    """What norms see, as they put it out before their weights: sums of x x^T.

    Args:
        size: Of x.
        eps: Of the norms.
    """

    def __init__(self, size: int, eps: float) -> None:
        self.gram, self.eps = Gram(size, dtype=torch.float64), eps

    def see(self, hidden: Tensor) -> None:
        """Take note of what enters a norm [B, S, H]."""
        rows = hidden.detach().flatten(0, -2).double().cpu()
        self.gram.add(rows * (rows.square().mean(-1, keepdim=True) + self.eps).rsqrt())

    def components(self, model: CalibratedModel, number: int) -> Tensor:
        """Return the first principal components over all ranks, the largest first [H, number] fp64; a collective.

        Raises:
            RunError: The signal is not finite.
        """
        self.gram.reduce(model.total)
        found = self.gram.whole()
        if not torch.isfinite(found).all():
            raise RunError("slicegpt: the residual stream is not finite on the calibration rows; look at the data")
        return torch.linalg.eigh(found).eigenvectors.flip(1)[:, :number].contiguous()


def _turned(name: str, weight: Tensor, gains: Mapping[str, Tensor], turn: Rotations) -> Tensor:
    """Return a tensor of a block in the coordinates of its rotations, norms' weights taken into it."""
    part, _, layer = name.partition(".")
    layer = layer.split(".")[0]
    if layer in ("q_proj", "k_proj", "v_proj") and name.endswith("weight"):
        return (weight * gains[NORMS[0]]) @ turn.entry
    if layer in ("gate_proj", "up_proj") and name.endswith("weight"):
        return (weight * gains[NORMS[1]]) @ turn.middle
    if layer in ("o_proj", "down_proj"):
        return (turn.middle if part == "self_attn" else turn.leaving).t() @ weight
    return weight


def project(hidden: Tensor, components: Tensor) -> Tensor:
    """Return hidden states [..., H] without what lies outside of the components [H, kept]."""
    components = components.to(hidden)
    return (hidden @ components) @ components.t()


@contextmanager
def _inputs_of(block: SeenBlock, names: Sequence[str], see: Callable[[Tensor], None]) -> Iterator[None]:
    """Look at what some modules of a block are called with."""
    with ExitStack() as stack:
        for name in names:
            hook = block.module.get_submodule(name).register_forward_pre_hook(lambda _, inputs: see(inputs[0]))
            stack.callback(hook.remove)
        yield


@contextmanager
def _sliced(block: SeenBlock, entry: Tensor, middle: Tensor | None) -> Iterator[None]:
    """Have a block compute what it does with its stream sliced where it enters, and before the MLP."""
    entering: list[Tensor] = []

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        entering[:] = [project(inputs[0], entry)]
        return (entering[0], *inputs[1:])

    def between(_: nn.Module, __: Any, output: Any) -> Any:
        assert middle is not None
        # Such that entering + output is what is left of their sum.
        output, *others = output if isinstance(output, tuple) else (output,)
        output = project(entering[0] + output, middle) - entering[0]
        return (output, *others) if others else output

    with ExitStack() as stack:
        stack.callback(block.module.register_forward_pre_hook(enter).remove)
        if middle is not None:
            attention = block.module.get_submodule("self_attn")
            stack.callback(attention.register_forward_hook(between).remove)
        yield
