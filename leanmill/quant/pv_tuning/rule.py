"""V steps: which codes move, and where to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.core.rules import StepContext, StepRule, check_trained
from leanmill.core.selection import largest, largest_within
from leanmill.core.site import Site
from leanmill.core.sites import changed_before, iter_stages
from leanmill.core.stage import Slot
from leanmill.core.views import View
from leanmill.quant.pv_tuning.stage import PvStage


class Decoder:
    """What codes of a rank's piece of a weight stand for, from the levels of the whole.

    Args:
        stage: Of the weight.
        levels: Whole, flattened.
        index: Where each element of the piece lies in the flattened weight.
    """

    def __init__(self, stage: PvStage, levels: Tensor, index: Tensor) -> None:
        num_in, width = stage.num_in, stage.width
        self.zero, self.num_codes, self.levels = stage.zero, stage.num_codes, levels
        self.place = index // num_in * width
        if self.zero is not None:
            self.place = self.place + index % num_in // (num_in // width)

    def values(self, codes: Tensor, among: Tensor | None = None) -> Tensor:
        """Return what codes stand for, those of the elements that are `among`, fp32."""
        place = self.place if among is None else self.place[among]
        if self.zero is None:
            return self.levels[place + codes.long()]
        return self.levels[place] * (codes.float() - self.zero)

    def nearest(self, wanted: Tensor, codes: Tensor, among: Tensor, *, is_forced: bool) -> Tensor:
        """Return the codes next to what is wanted of the elements that are `among`; of two as near the lower.

        Args:
            wanted: What weights should be [n].
            codes: What they have [n].
            among: Which they are, bool like the piece.
            is_forced: Take only levels that lie beyond the present one, seen from there towards what is wanted; where
                there is none, the code stays.
        """
        before = self.values(codes, among)
        best, least = codes.clone(), torch.full_like(before, torch.inf)
        for code in range(self.num_codes):
            value = self.values(torch.full_like(codes, code), among)
            distance = (wanted - value).abs()
            if is_forced:
                distance = distance.masked_fill((wanted - before) * (value - before) <= 0, torch.inf)
            is_better = distance < least
            best[is_better] = code
            least = torch.minimum(distance, least)
        return best


class MoveCodes(StepRule):
    """Moves codes after the optimizer has stepped; see `PvTuning` for the arguments.

    A step whose gradients are not finite moves nothing.
    """

    name = "pv_tuning"

    def __init__(
        self, model: nn.Module, *, every_steps: int, max_change: float, trust_ratio: float, accumulate: bool
    ) -> None:
        self.model, self.every_steps, self.accumulate = model, every_steps, accumulate
        self.max_change, self.trust_ratio = max_change, trust_ratio
        self._metrics: dict[str, float] = {}

    def check(self) -> None:
        for site, _ in self._stages():
            check_trained(self.name, site.site_name, site.raw_weight.requires_grad)
            before = changed_before(site, Slot.QUANT)
            if before is not None:
                raise ConfigError(
                    f"{self.name} moves codes of {site.site_name}, whose weight {before!r} changes before; remove "
                    f"one of the two techniques, or add {site.site_name!r} to {self.name}.exclude"
                )

    def before_optimizer(self, context: StepContext) -> None:
        if context.step == 0:
            for weight, codes, decoder in self._pieces(context):
                weight.value.copy_(decoder.values(codes.value))

    def after_optimizer(self, context: StepContext) -> None:
        is_due = context.step > 0 and context.step % self.every_steps == 0
        if bool(context.skipped) or (self.accumulate and not is_due):
            return
        written: list[View] = []
        num_moved = num_codes = 0
        for weight, codes, decoder in self._pieces(context):
            if is_due:
                moved = self._moved(weight, codes.value, decoder, context)
                num_moved += int(weight.reduce((moved != codes.value).sum(), "sum"))
                num_codes += weight.numel
                codes.value.copy_(moved)
                written.append(codes)
            if not self.accumulate:
                weight.value.copy_(decoder.values(codes.value))
                written.append(weight)
        assert context.views is not None
        context.views.publish(written)
        if num_codes:
            self._metrics = {"moved": num_moved / num_codes}

    def _moved(self, weight: View, codes: Tensor, decoder: Decoder, context: StepContext) -> Tensor:
        """Return the codes after a V step."""
        share = 1.0 if self.accumulate else 1 - context.step / context.num_steps
        before = decoder.values(codes)
        difference = (weight.value.float() - before).abs()
        picked = largest(difference, math.ceil(share * self.max_change * weight.numel), view=weight)
        moved = codes.clone()
        moved[picked] = decoder.nearest(
            weight.value[picked].float(), codes[picked], picked, is_forced=not self.accumulate
        )
        cost = (decoder.values(moved) - before).double().square()
        size = float(weight.reduce(before.double().square().sum(), "sum"))
        budget = (share * self.trust_ratio) ** 2 * size
        return torch.where(largest_within(difference, cost, budget, among=picked, view=weight), moved, codes)

    def _stages(self) -> Iterator[tuple[Site, PvStage]]:
        return iter_stages(self.model, PvStage)

    def _pieces(self, context: StepContext) -> Iterator[tuple[View, View, Decoder]]:
        """Yield this rank's piece of each weight, that of its codes, and what decodes them."""
        assert context.views is not None
        for site, stage in self._stages():
            weight = context.views.of(site.raw_weight)  # type: ignore[arg-type]
            levels = _whole(context.views.of(stage.levels))
            yield weight, weight.beside(stage.chosen), Decoder(stage, levels, weight.index())

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self._metrics} if self._metrics else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._metrics = dict(state["metrics"])

    def metrics(self) -> Mapping[str, float]:
        return self._metrics


def _whole(view: View) -> Tensor:
    """Return all of a small parameter, flattened, fp32: pieces of scales are cut elsewhere than those of weights."""
    found = torch.zeros(view.numel, dtype=torch.float32, device=view.value.device)
    found[view.index().flatten()] = view.value.float().flatten()
    return view.reduce(found, "sum")
