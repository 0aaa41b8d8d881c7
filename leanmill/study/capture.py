"""Where every token of an evaluation goes, in every layer with experts; one process."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from leanmill.core.batches import Batch
from leanmill.core.errors import ConfigError
from leanmill.core.places import find_modules
from leanmill.core.probes import Finding, Probe
from leanmill.study.routed import Ids, Routed


class Capture(Probe):
    """Keeps the experts that each router chose.

    Args:
        model: A causal LM whose blocks are not compiled.

    Raises:
        ConfigError: It has no router.
    """

    name = "capture"

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[int] = []
        """Of the routers, in the order of the model."""
        self._rows: list[dict[str, Any]] = []
        self._domains: list[list[dict[str, Any]]] = []
        self.by_domain: dict[str, list[Routed]] = {}
        """By domain: where its rows went in each of `layers`."""
        self._num_experts: list[int] = []
        for index, (_, layer, router) in enumerate(find_modules(model, "router")):
            self.layers.append(index if layer is None else layer)
            self._num_experts.append(0)
            router.register_forward_hook(functools.partial(self._keep, index))
        if not self.layers:
            raise ConfigError(
                "--routing studies a mixture of experts, and this model has no routers; leave it out, or name a "
                "checkpoint of one, e.g. of recipes/moe_quickstart.yaml"
            )

    def begin(self, batch: Batch) -> None:
        labels = batch["labels"]
        is_real = (labels != -100).any(1, keepdim=True).expand(labels.shape)
        if "token_mask" in batch:
            is_real = is_real & batch["token_mask"]
        self._rows.append({"tokens": _array(batch["input_ids"]), "is_real": _array(is_real), "experts": {}})

    def _keep(self, index: int, router: nn.Module, args: Any, output: Sequence[Tensor]) -> None:
        logits, _, experts = output[:3]
        rows = self._rows[-1]
        self._num_experts[index] = logits.shape[-1]
        rows["experts"][index] = _array(experts.reshape(*rows["tokens"].shape, -1))

    def take(self) -> Tensor:
        self._domains.append(self._rows)
        self._rows = []
        return torch.zeros(0)

    def find(self, counts: Mapping[str, Tensor]) -> Finding:
        parts = self._domains[-len(counts) :]
        self._domains = []
        self.by_domain = {
            name: [self._routed(rows, index) for index in range(len(self.layers))]
            for name, rows in zip(counts, parts, strict=True)
        }
        return Finding()

    def _routed(self, rows: Sequence[Mapping[str, Any]], index: int) -> Routed:
        tokens, is_real = (np.concatenate([one[key] for one in rows]) for key in ("tokens", "is_real"))
        experts = np.concatenate([one["experts"][index] for one in rows])
        kept = is_real.any(1)
        return Routed(
            tokens=tokens[kept], experts=experts[kept], is_real=is_real[kept], num_experts=self._num_experts[index]
        )

    def all_domains(self, index: int) -> Routed:
        """Return where the rows of all domains went, one after another, in the layer at `index` of `layers`."""
        parts = [layers[index] for layers in self.by_domain.values()]
        joined: dict[str, Ids] = {
            key: np.concatenate([getattr(part, key) for part in parts]) for key in ("tokens", "experts", "is_real")
        }
        return Routed(num_experts=parts[0].num_experts, **joined)  # type: ignore[arg-type]


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()
