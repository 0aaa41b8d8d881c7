"""From a recipe's optimizer section to a torch optimizer with and without weight decay."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.parameters import PLAIN, ParamSettings
from leanmill.optim.config import Adam8bit, AdamW, OptimizerConfig


def build_optimizer(
    config: OptimizerConfig,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    undecayed: Collection[int] = (),
    settings: Callable[[str], ParamSettings] = lambda name: PLAIN,
) -> torch.optim.Optimizer:
    """Build the optimizer over every trainable parameter, each exactly once.

    Args:
        config: Which optimizer, with its settings.
        named_parameters: Dotted names and parameters (plain or DTensor); a parameter that is tied
            appears once however often it is named, frozen ones are left out.
        undecayed: Ids of parameters that get no weight decay whatever their name and shape.
        settings: By dotted name, what is to be otherwise than `config` says; a weight decay given
            there holds for parameters that get none by default too.

    Returns:
        The optimizer with a group for each combination of settings (`decay` or `no_decay` in the
        group's key `name`, and what differs from `config`), each with `initial_lr`, the peak that a
        schedule's factor multiplies, and `initial_weight_decay`, which a schedule may end. Groups at
        `config.lr` come first.

    Raises:
        ConfigError: Nothing is trainable, the optimizer's package is not installed, or one but AdamW is to pull.
    """
    groups = parameter_groups(config, named_parameters, undecayed, settings)
    optimizer = _build_inner(config, groups)
    if config.lookahead is None:
        return optimizer
    from leanmill.optim.lookahead import Lookahead

    return Lookahead(optimizer, config.lookahead.every, config.lookahead.alpha)


def parameter_groups(
    config: OptimizerConfig,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    undecayed: Collection[int] = (),
    settings: Callable[[str], ParamSettings] = lambda name: PLAIN,
) -> list[dict[str, Any]]:
    """Split trainable parameters by weight decay, by what rules say of them, and by how they are sharded.

    Operations on many tensors at once take those of one mesh.
    """
    members: dict[tuple[bool, ParamSettings, int], list[nn.Parameter]] = {}
    meshes: list[Any] = []
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            said = settings(name)
            decay = said.weight_decay is None and id(parameter) not in undecayed and decays(name, parameter)
            mesh = getattr(parameter, "device_mesh", None)
            if mesh not in meshes:
                meshes.append(mesh)
            members.setdefault((decay, said, meshes.index(mesh)), []).append(parameter)
    if not seen:
        raise ConfigError(
            "no parameter is trainable: the techniques freeze the base model and add nothing to train; "
            "add a technique with parameters (e.g. {type: lora}) or remove the one that freezes"
        )
    # What is logged as the learning rate is the first group's.
    order = sorted(members, key=lambda key: (key[1].lr_factor is not None, _group_name(*key[:2]), key[2]))
    return [_group(config, *key[:2], members[key]) for key in order]


def _group(config: OptimizerConfig, decay: bool, said: ParamSettings, params: list[nn.Parameter]) -> dict[str, Any]:
    lr = config.lr * (1.0 if said.lr_factor is None else said.lr_factor)
    weight_decay = said.weight_decay if said.weight_decay is not None else config.weight_decay if decay else 0.0
    group: dict[str, Any] = {"params": params, "name": _group_name(decay, said), "weight_decay": weight_decay}
    group |= {"lr": lr, "initial_lr": lr, "initial_weight_decay": weight_decay}
    own = {"betas": said.betas, "pull": said.pull, "kept": said.kept}
    return group | {key: value for key, value in own.items() if value is not None}


def _group_name(decay: bool, said: ParamSettings) -> str:
    """Name a group by its settings alone, so that it is called the same in every run of a recipe."""
    parts = ["decay" if decay else "no_decay"]
    if said.weight_decay is not None:
        parts = [f"weight_decay {said.weight_decay:g}"]
    if said.lr_factor is not None:
        parts.append(f"lr x {said.lr_factor:g}")
    if said.betas is not None:
        parts.append(f"betas {said.betas[0]:g} {said.betas[1]:g}")
    if said.pull is not None:
        parts.append(f"{said.pull} pulled")
    if said.kept is not None:
        parts.append(f"{said.kept} kept")
    return ", ".join(parts)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, embeddings and stacked experts, not to biases, norms and vectors."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor behind
    owner, _, leaf = name.rpartition(".")
    return len(shape) > 1 and not leaf.endswith("bias") and "norm" not in owner.rpartition(".")[2].lower()


def _build_inner(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if any("pull" in group or "kept" in group for group in groups):
        return _build_pulled(config, groups)
    if isinstance(config, AdamW):
        fused = fused_is_supported(groups)
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay,
            fused=fused or None, foreach=None if fused else True,
        )  # fmt: skip
    if isinstance(config, Adam8bit):
        return _build_adamw8bit(config, groups)
    from leanmill.optim.lion import Lion

    return Lion(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def _build_pulled(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if not isinstance(config, AdamW):
        raise ConfigError(
            f"a technique keeps tensors in the optimizer's state, to pull weights or to prune them, which "
            f"optimizer.type={config.type} cannot; set optimizer.type=adamw"
        )
    from leanmill.optim.pulled import PulledAdamW

    return PulledAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


def fused_is_supported(groups: list[dict[str, Any]]) -> bool:
    """Whether torch has a fused AdamW for these parameters' devices and dtypes."""
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

    supported = _get_fused_kernels_supported_devices()
    return all(p.device.type in supported and p.is_floating_point() for group in groups for p in group["params"])


def _build_adamw8bit(config: Adam8bit, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    try:
        from leanmill.optim.adamw8bit import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "optimizer.type: adamw8bit needs torchao, which is not installed; type `pip install torchao`, "
            "or use optimizer.type: adamw"
        ) from error
    return AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
