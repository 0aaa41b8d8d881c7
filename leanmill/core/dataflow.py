"""What feeds what inside decoder blocks, seen in one forward of a few tokens, which a model on meta can do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.around import arounds
from leanmill.core.blocks import decoder_blocks
from leanmill.core.errors import ConfigError
from leanmill.core.experts import is_stacked_experts
from leanmill.core.places import holds_matmul, is_norm


_NUM_TOKENS = 4


def pre_norms(model: nn.Module) -> set[int]:
    """Return the ids of the norms in decoder blocks whose output enters a layer with matmuls as it is.

    These are the norms of pre-norm blocks, sequential and parallel, and the first ones of sandwich blocks; what
    normalises the output of attention or MLP, and norms inside them, are not.

    Raises:
        ConfigError: The model cannot be run without values.
    """
    made: list[tuple[int, Any]] = []
    found: set[int] = set()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        made.append((id(module), output))

    def match(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        found.update(norm for norm, output in made if any(_is_same(output, value) for value in given))

    with ExitStack() as stack:
        for child in (child for block in decoder_blocks(model) for child in block.children()):
            if is_norm(child):
                stack.callback(child.register_forward_hook(note).remove)
            elif holds_matmul(child):
                stack.callback(child.register_forward_pre_hook(match, with_kwargs=True).remove)
        _run(model)
    return found


def check_blocks(model: Any, technique: str, *, tensors: Collection[str] | None = None) -> None:
    """Refuse a family whose blocks take and return more than one tensor of hidden states.

    Args:
        model: A causal LM, perhaps on meta.
        technique: For messages.
        tensors: Names of the other arguments that may hold tensors; None allows any.

    Raises:
        ConfigError: It does, or it cannot be run without values.
    """
    calls: list[tuple[Any, Any]] = []
    given: set[str] = set()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((args[0] if args else None, output))
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        named = dict(zip(names[1:], args[1:], strict=False)) | kwargs
        given.update(name for name, value in named.items() if _holds_tensor(value))

    with ExitStack() as stack:
        for block in decoder_blocks(model):
            stack.callback(block.register_forward_hook(note, with_kwargs=True).remove)
        _run(model)
    others = sorted(given - set(tensors)) if tensors is not None else []
    if others:
        raise ConfigError(
            f"{technique} does not know what to do with {others[0]!r}, which blocks of model type "
            f"{model.config.model_type!r} are given beside hidden states; choose another family, e.g. llama"
        )
    if not all(isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape for x, y in calls):
        raise ConfigError(
            f"{technique} needs decoder blocks that turn hidden states into hidden states, and those of model type "
            f"{model.config.model_type!r} return more; choose another family, e.g. llama"
        )


def _holds_tensor(value: Any) -> bool:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return isinstance(value, Tensor) or any(_holds_tensor(part) for part in parts)


def final_norm(model: Any) -> nn.Module | None:
    """Return the norm that makes the body's last hidden state of what the last block returns; None if there is more.

    Raises:
        ConfigError: The model cannot be run without values.
    """
    last: list[Any] = []
    norms: list[tuple[nn.Module, Any, Any]] = []
    blocks = decoder_blocks(model)
    inside = {id(module) for block in blocks for module in block.modules()}
    with ExitStack() as stack:
        stack.callback(blocks[-1].register_forward_hook(lambda *call: last.append(call[-1])).remove)
        stack.callback(model.base_model.register_forward_hook(lambda *call: last.append(call[-1][0])).remove)
        for module in model.modules():
            if is_norm(module) and id(module) not in inside:
                hook = module.register_forward_hook(lambda norm, args, output: norms.append((norm, args[0], output)))
                stack.callback(hook.remove)
        _run(model)
    given, wanted = last
    return next((norm for norm, entered, left in norms if _is_same(entered, given) and _is_same(left, wanted)), None)


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same shape: one may be a view of the other."""
    shares = tensor.untyped_storage()._cdata == other.untyped_storage()._cdata
    return shares and tensor.shape == other.shape


@torch.no_grad()
def _run(model: Any) -> None:
    """Run the plain model on a row of tokens, in eval mode, on its own device, without stages and experts."""
    was_training = model.training
    length = _NUM_TOKENS
    try:
        with _eager_attention(model), _plain_layers(model), model.device:
            model.eval()(
                input_ids=torch.zeros(1, length, dtype=torch.long),
                # Making a mask would ask for the values of positions.
                attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool),
                position_ids=torch.arange(length)[None],
                use_cache=False,
            )
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"model type {model.config.model_type!r} cannot be run without values, so what its norms feed and what its "
            f"blocks return is not known; choose another family, e.g. llama ({str(error).splitlines()[0][:120]})"
        ) from error
    finally:
        model.train(was_training)


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """For the time of the context; the other implementations need values, or a GPU."""
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


@contextmanager
def _plain_layers(model: nn.Module) -> Iterator[None]:
    """Without stages and arounds, which want values, and without experts, whose sizes depend on them."""
    with ExitStack() as stack:
        for module in model.modules():
            plain = _plain_forward(module)
            if plain is not None:
                stack.enter_context(_other_body(module, MethodType(plain, module)))
        yield


@contextmanager
def _other_body(module: nn.Module, body: Callable[..., Tensor]) -> Iterator[None]:
    outer = vars(module).get("forward")
    module.forward = body
    try:
        yield
    finally:
        if outer is None:
            del module.forward
        else:
            module.forward = outer


def _plain_forward(module: nn.Module) -> Callable[..., Any] | None:
    if is_stacked_experts(module):
        return lambda _, hidden, *routing: torch.empty_like(hidden)
    if any(True for _ in arounds(module)):
        return type(module).forward
    return next((kind.forward for kind in (nn.Linear, nn.Embedding) if isinstance(module, kind)), None)
