"""Weights that are staged once an optimizer step rather than at every use, and the way back for their gradient.

The optimizer's master is the raw weight; what the model multiplies with is stage(master). Backward leaves
the gradient of the staged weight, summed over all uses, in the raw weight's `grad`; a vector-Jacobian
product is linear in that vector, so one backward of the stages then turns the sum into the raw weight's own.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from leanmill.core.facets import Packing, PartStaging, Statistic
from leanmill.core.site import Site
from leanmill.core.sites import iter_sites
from leanmill.core.stage import Stage


class StagedOnce:
    """One weight and the stages that all sites which multiply with it share.

    Args:
        sites: The sites, whose weight is not sharded yet.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = tuple(sites)
        self.shape = sites[0].raw_weight.shape
        """Of the whole weight."""

    @property
    def raw(self) -> nn.Parameter:
        """The live master, which may be a shard."""
        return self.sites[0].raw_weight  # type: ignore[return-value]

    @property
    def stages(self) -> list[Stage]:
        """Its stages, in slot order."""
        return self.sites[0].weight_stages()

    @property
    def own(self) -> list[nn.Parameter]:
        """Live parameters of the stages, in their order."""
        return [p for stage in self.stages for p in stage.parameters()]

    @property
    def packing(self) -> Packing | None:
        """How what its stages return can be sent in fewer bytes; of several ways that of the last stage."""
        return next((p for stage in reversed(self.stages) if (p := stage.packing(self.shape)) is not None), None)

    def goes_by_row(self, parameter: Tensor) -> bool:
        """Whether a stage's (whole) parameter has an entry for each slice of the weight's first dim."""
        return parameter.dim() > 0 and parameter.shape[0] == self.shape[0]


class Tape:
    """One staging of a weight, or of a part of it, and what its backward needs.

    A single stage keeps its graph: by the rules of stages that holds references only. Of several, each
    keeps what the one before returned; they run once more instead.

    Args:
        weight: Whose stages run.
        master: The raw weight or this rank's part of it.
        own: In place of the stages' parameters: whole for a whole weight, see `Stage.on_part` for a part.
        is_part: Whether `master` is a part.
        has_backward: Whether `pull_back` will be called; the raw weight is trained then.
    """

    def __init__(
        self, weight: StagedOnce, master: Tensor, own: Sequence[Tensor], *, is_part: bool, has_backward: bool
    ) -> None:
        self._weight, self._is_part = weight, is_part
        # Leaves of their own: hooks of an engine wait on those of the parameters.
        needs = [has_backward, *(has_backward and p.requires_grad for p in weight.own)]
        self._leaves = [t.detach().requires_grad_(need) for t, need in zip((master, *own), needs, strict=True)]
        self._keeps_graph = has_backward and len(weight.stages) == 1
        self._answers: list[Tensor] = []
        self._edge: torch.autograd.graph.GradientEdge | None = None

    def staging(self) -> PartStaging:
        """Stage: yields statistics where the weight is a part, returns the staged weight without a graph."""
        run, answer = self._run(), None
        while True:
            with torch.set_grad_enabled(self._keeps_graph):
                try:
                    question = next(run) if answer is None else run.send(answer)
                except StopIteration as end:
                    staged: Tensor = end.value
                    break
            answer = yield question
            self._answers.append(answer)
        if self._keeps_graph:
            self._edge = get_gradient_edge(staged)
        return staged.detach()

    def pull_back(self, gradient: Tensor) -> list[Tensor | None]:
        """Return the gradients of the master and of each of `own`, from that of the staged weight. Once."""
        edge = self._edge
        if edge is None:
            with torch.enable_grad():
                edge = get_gradient_edge(_answered(self._run(), self._answers))
        wanted = [leaf for leaf in self._leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad([edge], wanted, [gradient], allow_unused=True))
        return [next(found) if leaf.requires_grad else None for leaf in self._leaves]

    def _run(self) -> PartStaging:
        part, *own = self._leaves
        for stage in self._weight.stages:
            twin, own = _with_parameters(stage, own)
            if self._is_part:
                staging = twin.on_part(part, self._weight.shape)
                assert staging is not None
                part = yield from staging
            else:
                part = twin(part)
        return part


def _answered(staging: PartStaging, answers: Sequence[Tensor]) -> Tensor:
    try:
        next(staging)
        for answer in answers:
            staging.send(answer)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise RuntimeError("a stage asked for more than the first time it ran")


def _with_parameters(module: Stage, tensors: list[Tensor]) -> tuple[Stage, list[Tensor]]:
    """Copy a stage shallowly, its parameters replaced by the first of `tensors`; return it and the others."""
    twin = copy.copy(module)
    twin._parameters, twin._modules = dict(module._parameters), dict(module._modules)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            twin._parameters[name], *tensors = tensors  # type: ignore[assignment]
    for name, child in module._modules.items():
        if child is not None:
            twin._modules[name], tensors = _with_parameters(child, tensors)  # type: ignore[arg-type]
    return twin, tensors


def run_together(
    stagings: Sequence[Generator[Statistic, Tensor, Tensor]],
    answer: Callable[[list[Statistic]], list[Tensor]],
) -> list[Tensor]:
    """Run stagings side by side, so that one call of `answer` serves what all of them ask at a time."""
    results: list[Tensor | None] = [None] * len(stagings)
    waiting = dict.fromkeys(range(len(stagings)))
    answers: dict[int, Tensor | None] = dict(waiting)
    while True:
        asked: dict[int, Statistic] = {}
        for index, value in answers.items():
            try:
                asked[index] = next(stagings[index]) if value is None else stagings[index].send(value)
            except StopIteration as end:
                results[index] = end.value
        if not asked:
            return results  # type: ignore[return-value]
        answers = dict(zip(asked, answer(list(asked.values())), strict=True))


def staged_once(
    model: nn.Module, *, in_parts: bool, reason_against: Callable[[StagedOnce], str | None] = lambda weight: None
) -> tuple[list[StagedOnce], dict[str, str]]:
    """Find the weights that may be staged once a step.

    Args:
        model: A model or train module before it is sharded; it may be on meta.
        in_parts: Whether each rank stages a part of a weight's rows.
        reason_against: What speaks against one that stages allow, if anything.

    Returns:
        The weights, and for each other staged site the reason, by its name. Frozen weights that are only decoded,
        a layer at a time, are neither: kept decoded they would take the memory that their form saves.
    """
    by_weight: dict[int, list[Site]] = defaultdict(list)
    for _, site in iter_sites(model):
        by_weight[id(site.raw_weight)].append(site)
    found: list[StagedOnce] = []
    reasons: dict[str, str] = {}
    for sites in by_weight.values():
        if _is_only_decoded(sites):
            continue
        reason = _reason_against(sites, in_parts) or (reason_against(StagedOnce(sites)) if sites[0].stages else None)
        if reason is None and sites[0].stages:
            found.append(StagedOnce(sites))
        reasons |= {site.site_name: reason for site in sites if reason is not None and site.stages}
    return found, reasons


def _is_only_decoded(sites: Sequence[Site]) -> bool:
    stages = [stage for site in sites for stage in site.weight_stages()]
    return bool(stages) and all(stage.decoder() is not None for stage in stages)


def _reason_against(sites: Sequence[Site], in_parts: bool) -> str | None:
    stages, weight = sites[0].weight_stages(), sites[0].raw_weight
    if any(site.weight_stages() != stages for site in sites):
        return "sites that share it stage it each in their own way"
    for stage in stages:
        if not stage.once_a_step:
            return f"{stage.technique} stages at every use"
        if stage.has_backward_weight:
            return f"{stage.technique} stages it twice, for forward and for backward"
        if in_parts and stage.on_part(weight, weight.shape) is None:
            return f"{stage.technique} needs all of its rows"
    if not weight.requires_grad and any(p.requires_grad for stage in stages for p in stage.parameters()):
        return "it is frozen while its stages train"
    return None
