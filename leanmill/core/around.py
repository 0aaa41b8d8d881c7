"""Work around the call of a module: skipped, joined by a branch, scaled; its parameters keep their names."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leanmill.core.stage import AROUND, TechniqueModule


Call = Callable[..., Any]
"""What an `Around` wraps: the module's own forward, or the next ring inwards."""


class Ring(IntEnum):
    """The only order of what stands around one module, outermost first, whatever order a recipe lists it in.

    Rings hold any number of tenants; those of one ring stand in the order of their techniques' names.
    """

    TAP = 0
    """Looks at what the next module gets."""
    SKIP = 1
    """Decides what goes in at all."""
    BRANCH = 2
    """Adds to what comes out."""
    SCALE = 3
    """Changes what goes in or comes out, next to the module."""
    DECIDE = 4
    """Computes what comes out in the module's place, from its weights."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What an export of the plain model may carry beside the weights of its modules."""

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """By name in a Hugging Face folder of the family."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the configuration, that go with them."""
    notes: tuple[str, ...] = ()
    """For the report of the export."""


@dataclass(frozen=True, kw_only=True)
class OwnForm:
    """A model of a family of Leanmill's own that computes what the plain one does within something around modules."""

    make: Callable[[Any], Any]
    """Takes the folded plain model, which it takes over, and returns a causal LM whose code can travel with it."""
    prefix: str
    """Under this name, with a dot, it holds the plain model's parameters."""


class Around(TechniqueModule):
    """Something around the call of one module, with parameters and buffers of its own.

    Rules for implementers:

    - `forward` gets the next call inwards and the caller's arguments, and returns what the module would.
    - Hooks of the module (a sharding engine's gathers, somebody's taps) run outside of it, on every rank,
      whether the module is called or not. Ranks may differ in what they mask, not in whether they call:
      a module that gave no gradient on one rank only would leave the others waiting.
    - Around a decoder block it runs outside of activation checkpointing, once a forward. Around what lies
      inside a block the recomputation runs it again: there it must depend on its arguments and on
      buffers that stay as they are from forward to backward.
    - Own parameters are sharded with the module's, have at least 1 dim, and are named
      `<module>.around.<technique>.<name>`. Schedules are non-persistent buffers of shape (1,).
    - In eval mode it computes what `fold` leaves behind.
    """

    technique: ClassVar[str]
    """Registered name of the technique, for messages."""
    ring: ClassVar[Ring]

    def forward(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns; call `call(*args, **kwargs)`, at most once, to run it."""
        raise NotImplementedError

    @property
    def module(self) -> nn.Module:
        """What it stands around."""
        return self.__dict__["_module"]  # type: ignore[no-any-return]

    def without_running(self, hidden: Tensor) -> Tensor:
        """Return `hidden`, and give all weights of the module gradients of zero.

        For a forward that does not call the module: a weight without any gradient would hang DDP, be passed
        over by some engines' optimizers, and keep its gradient of the last step under ZeRO-3, where even
        this does not help since weights are not there: see `TechniqueConfig.leaves_modules_out`.
        """
        weights = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        return _WithoutRunning.apply(hidden, *weights)  # type: ignore[no-any-return]

    def unfold(self, module: nn.Module) -> None:
        """Change `module`, in place, so that within this it computes what it did alone: undo a `fold`.

        Called on a full copy in fp32 on the CPU, after weights were loaded from an existing model, if
        `unfolds`; not on resume.
        """

    @property
    def unfolds(self) -> bool:
        """Whether weights that are loaded have been folded."""
        return False

    def beside(self) -> Beside | None:
        """Return what is lost when this is taken off: its weights where the family has a place, else a note."""
        return None

    def own_form(self) -> OwnForm | None:
        """Return what an export can write in place of the plain model, which cannot hold this; None where it can."""
        return None

    def fold(self, module: nn.Module) -> None:
        """Change `module`, in place, so that alone it computes in eval mode what it does within this.

        Nothing to do where that is so already. fp32, on the CPU, without gradients.

        Raises:
            ConfigError: No plain module computes it; the message says what to type.
        """


class _WithoutRunning(torch.autograd.Function):
    """Identity on the first argument; the others get gradients of zero."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *weights: Tensor) -> Tensor:
        ctx.like = [(weight.shape, weight.dtype, weight.device) for weight in weights]
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        # Without memory until they are accumulated.
        zeros = [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.like]
        return gradient, *zeros


class _Rings:
    """Its `call` stands as a module's `forward`.

    A class, since copies and pickles of the module must be right; a bound method of it, since compiled blocks
    would not share their code over a callable object each of their modules has one of.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(tuple(arounds(self.module)), args, kwargs)

    def _call(self, rings: tuple[Around, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not rings:
            # Asked for anew: sharding gives the module another class. With activation checkpointing this
            # is where the recomputed part begins.
            return type(self.module).forward(self.module, *args, **kwargs)

        def inner(*args: Any, **kwargs: Any) -> Any:
            return self._call(rings[1:], args, kwargs)

        return rings[0](inner, *args, **kwargs)


def put_around(module: nn.Module, around: Around) -> None:
    """Let `around` wrap every call of `module`, in its ring."""
    held = dict(_held(module))
    names = (f"{around.technique}_{number}" if number > 1 else around.technique for number in itertools.count(1))
    members = {**held, next(name for name in names if name not in held): around}
    in_order = sorted(members, key=lambda name: members[name].ring)
    module._modules[AROUND] = nn.ModuleDict({name: members[name] for name in in_order})
    module.forward = _Rings(module).call
    # Past nn.Module's registration, which would make a cycle of parents.
    around.__dict__["_module"] = module
    around.train(module.training)


def arounds(module: nn.Module) -> Iterator[Around]:
    """Yield what stands around `module`, outermost first."""
    yield from _held(module).values()


def _held(module: nn.Module) -> Mapping[str, Around]:
    held = module._modules.get(AROUND)
    return {} if held is None else held._modules  # type: ignore[return-value]


def iter_arounds(model: nn.Module) -> Iterator[tuple[str, nn.Module, Around]]:
    """Yield (path of the module, module, what stands around it), outermost first."""
    for path, module in list(model.named_modules()):
        for around in arounds(module):
            yield path, module, around


def own_form(model: nn.Module) -> OwnForm | None:
    """Return the form of its own that something around modules of `model` has, the first found."""
    return next((form for _, _, around in iter_arounds(model) if (form := around.own_form()) is not None), None)


def take_off_own(model: nn.Module) -> OwnForm | None:
    """Take off what has a form of its own, with all that its technique put around modules; return the form."""
    forms = ((around.technique, around.own_form()) for _, _, around in iter_arounds(model))
    technique, form = next((pair for pair in forms if pair[1] is not None), (None, None))
    if technique is not None:
        for module in list(model.modules()):
            held = module._modules.get(AROUND)
            if held is not None:
                for key in [key for key, one in _held(module).items() if one.technique == technique]:
                    del held._modules[key]
                if not held._modules:
                    take_off(module)
    return form


def take_off(module: nn.Module) -> None:
    """Leave `module` as it was before anything stood around it."""
    if module._modules.pop(AROUND, None) is not None:
        del module.__dict__["forward"]
