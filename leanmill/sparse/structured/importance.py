"""How much the parts of a model matter, by what flows through them on calibration rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import RunError
from leanmill.core.gram import Gram
from leanmill.core.surgery import CalibratedModel, Part, SeenBlock
from leanmill.sparse.structured.anatomy import axes_of


HEADS, NEURONS = "self_attn.o_proj", "mlp.down_proj"
"""Linear layers of a block whose inputs are what heads and neurons put out."""
NORMS = ("input_layernorm", "post_attention_layernorm")
"""Whose outputs are what attention and MLP see of the residual stream."""


class Activations:
    """Sums over sequences of (mean over tokens of |a|)^2, one for each feature, by module of a block."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    @contextmanager
    def watch(self, block: SeenBlock, inputs: Collection[str], outputs: Collection[str]) -> Iterator[None]:
        """Look at the inputs of some modules and the outputs of others while a block runs."""
        with ExitStack() as stack:
            for name in inputs:
                hook = self._of_input(f"{block.index}.{name}")
                stack.callback(block.module.get_submodule(name).register_forward_pre_hook(hook).remove)
            for name in outputs:
                stack.callback(
                    block.module.get_submodule(name)
                    .register_forward_hook(self._of_output(f"{block.index}.{name}"))
                    .remove
                )
            yield

    def norm(self, layer: int, name: str) -> Tensor:
        """Return the l2 norm over sequences of the mean |a| [features] fp32."""
        return self.sums[f"{layer}.{name}"].sqrt()

    def total(self, model: CalibratedModel) -> None:
        """Sum over ranks. A collective.

        Raises:
            RunError: Not finite.
        """
        for key in sorted(self.sums):
            self.sums[key] = model.total(self.sums[key])
            if not torch.isfinite(self.sums[key]).all():
                raise RunError(f"layer {key} puts out what is not finite on the calibration rows; look at the data")

    def _of_input(self, key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: self._see(key, inputs[0])

    def _of_output(self, key: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, __, output: self._see(key, output)

    def _see(self, key: str, activations: Tensor) -> None:
        """Take note of activations [B, S, features]."""
        found = activations.detach().float().abs().mean(1).square().sum(0).cpu()
        self.sums[key] = self.sums[key] + found if key in self.sums else found


class _OfInputs:
    """What is summed over all tokens of what enters some modules of a block."""

    @contextmanager
    def watch(self, block: SeenBlock, inputs: Collection[str]) -> Iterator[None]:
        """Look at the inputs of some modules while a block runs."""
        with ExitStack() as stack:
            for name in inputs:
                hook = self._hook(f"{block.index}.{name}")
                stack.callback(block.module.get_submodule(name).register_forward_pre_hook(hook).remove)
            yield

    def _hook(self, key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        raise NotImplementedError


class Moments(_OfInputs):
    """Means and variances over all tokens of what enters some modules of a block."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        """[3, features] fp64: how many tokens, sum of x, sum of x^2."""

    def mean_and_variance(self, model: CalibratedModel, layer: int, name: str) -> tuple[Tensor, Tensor]:
        """Return both [features], fp64, over all ranks; a collective, which uses the sums up.

        Raises:
            RunError: Not finite.
        """
        number, first, second = model.total(self.sums.pop(f"{layer}.{name}"))
        if not bool(torch.isfinite(second).all()):
            raise RunError(
                f"what enters {name} of layer {layer} is not finite on the calibration rows; look at the data"
            )
        mean = first / number
        return mean, (second / number - mean.square()).clamp(min=0)

    def _hook(self, key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).double().cpu()
            found = torch.stack([torch.full_like(rows[0], len(rows)), rows.sum(0), rows.square().sum(0)])
            self.sums[key] = self.sums[key] + found if key in self.sums else found

        return see


class Grams(_OfInputs):
    """Sums of x x^T over all tokens of what enters some modules of a block."""

    def __init__(self) -> None:
        self.sums: dict[str, Gram] = {}

    def whole(self, model: CalibratedModel, layer: int, name: str) -> Tensor:
        """Return the sum over all ranks [features, features] fp64; a collective, which uses it up.

        Raises:
            RunError: Not finite.
        """
        gram = self.sums.pop(f"{layer}.{name}")
        gram.reduce(model.total)
        found = gram.whole()
        if not torch.isfinite(found).all():
            raise RunError(
                f"what enters {name} of layer {layer} is not finite on the calibration rows; look at the data"
            )
        return found

    def _hook(self, key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).double()
            self.sums.setdefault(key, Gram(rows.shape[1], dtype=torch.float64)).add(rows)

        return see


def influence(before: Tensor, after: Tensor) -> Tensor:
    """Return the sum over tokens of 1 - cos(input, output) of a block [B, S, H], fp64 ()."""
    return (1 - F.cosine_similarity(before.float(), after.float(), dim=-1)).double().sum()


def losses_without(model: CalibratedModel, parts: Collection[Part]) -> dict[Part, float]:
    """Return the loss of the model without each of some parts alone. A collective."""
    return dict(zip(parts, model.without([frozenset([part]) for part in parts]), strict=True))


def gradient_of_heads(model: CalibratedModel, num_heads: int, num_layers: int) -> list[Tensor]:
    """Return for each layer the mean over sequences of |dL / dxi_h|, xi_h a factor on head h; fp32 [heads].

    Michel et al. 2019, arXiv:1905.10650, eq. 2; L is the sum of a sequence's next-token losses. Holds the whole model,
    and hidden states for a backward. A collective.
    """
    whole: Any = model.whole()
    blocks = [whole.get_submodule(f"model.layers.{layer}.{HEADS}") for layer in range(num_layers)]
    sums = torch.zeros(num_layers, num_heads)
    for batch in model.rows:
        factors: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for layer, module in enumerate(blocks):
                hook = _with_factor(factors, layer, num_heads)
                stack.callback(module.register_forward_pre_hook(hook).remove)
            device = next(whole.parameters()).device
            ids = batch["input_ids"].to(device)
            logits = whole(input_ids=ids, position_ids=batch["position_ids"].to(device), use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, [factors[layer] for layer in range(num_layers)])
        sums += torch.stack([gradient.abs().sum(0).cpu() for gradient in gradients])
    num_rows = torch.tensor(float(sum(len(batch["input_ids"]) for batch in model.rows)))
    return list((model.total(sums) / model.total(num_rows)).unbind())


def _with_factor(factors: dict[int, Tensor], layer: int, num_heads: int) -> Callable[[nn.Module, tuple[Tensor]], Any]:
    """A hook that multiplies what heads put out [B, S, heads x head_dim] by a factor of 1 a sequence and head."""

    def hook(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        heads = inputs[0].unflatten(-1, (num_heads, -1))
        factors[layer] = torch.ones(len(heads), num_heads, device=heads.device, requires_grad=True)
        return ((heads * factors[layer][:, None, :, None]).flatten(-2),)

    return hook


@dataclass(frozen=True, kw_only=True)
class PartScores:
    """Importance of the parts of one layer, fp32."""

    groups: Tensor
    """Of key-value heads with all their query heads [groups]."""
    neurons: Tensor
    """[neurons]."""


def taylor_of_parts(model: CalibratedModel, groups: Sequence[int]) -> list[PartScores]:
    """Return for the parts of each layer the sum over their weights of |w dL/dw|, L the mean loss of all rows.

    Holds the whole model and gradients of its blocks. A collective.

    Args:
        model: The model.
        groups: Key-value heads of each layer.

    Raises:
        RunError: A gradient is not finite.
    """
    whole: Any = model.whole()
    blocks = [whole.get_submodule(f"model.layers.{layer}") for layer in range(len(groups))]
    for block in blocks:
        block.requires_grad_()
    device = next(whole.parameters()).device
    num_rows = 0
    for batch in model.rows:
        ids = batch["input_ids"].to(device)
        logits = whole(input_ids=ids, position_ids=batch["position_ids"].to(device), use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").backward()
        num_rows += ids.numel() - len(ids)
    all_rows = model.total(torch.tensor(float(num_rows)))
    found = []
    for block, number in zip(blocks, groups, strict=True):
        saliences = {}
        for name, parameter in sorted(block.named_parameters()):
            gradient = model.total(parameter.grad.cpu()) / all_rows
            saliences[name] = (parameter.detach().cpu() * gradient).abs()
            if not torch.isfinite(saliences[name]).all():
                raise RunError(f"the gradient of {name} is not finite on the calibration rows; look at model and data")
            parameter.grad = None
        found.append(scores_of_parts(saliences, number))
    return found


def scores_of_parts(saliences: Mapping[str, Tensor], groups: int) -> PartScores:
    """Return how much each part of a layer counts: the sum over all weights that belong to it.

    Args:
        saliences: Of each weight and bias of a block, by name relative to it.
        groups: Key-value heads of the layer.
    """
    sums: dict[str, list[Tensor]] = {"groups": [torch.zeros(groups)], "neurons": []}
    for name, salience in saliences.items():
        for dim, axis in enumerate(axes_of(name)):
            if axis in ("heads", "groups", "neurons"):
                one_dim = salience.float().movedim(dim, 0).flatten(1).sum(1)
                key = "neurons" if axis == "neurons" else "groups"
                sums[key].append(one_dim if key == "neurons" else one_dim.view(groups, -1).sum(1))
    return PartScores(
        groups=torch.stack(sums["groups"]).sum(0),
        neurons=torch.stack(sums["neurons"]).sum(0) if sums["neurons"] else torch.zeros(0),
    )
