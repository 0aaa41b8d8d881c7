"""A learned N:M mask as a stage: sampled softly in training, the likeliest one otherwise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from leanmill.core.noise import Noise
from leanmill.core.rules import StepContext, StepRule
from leanmill.core.sites import iter_sites
from leanmill.core.stage import Slot, Stage
from leanmill.kernels.sampled_mask import op as sampled_mask
from leanmill.kernels.sampled_mask.draw import Draw
from leanmill.sparse.mask_llm.product import masked


LOGITS_STD = 0.01
"""Standard deviation of the logits before the prior (as in the paper's code)."""


@dataclass(frozen=True)
class Schedule:
    """What changes over a run, linearly from its first to its last step."""

    temperature: tuple[float, float]
    scale: tuple[float, float]
    weight_regularisation: float
    """At the first step; 0 at the end."""


class MaskLlmStage(Stage):
    """Keep `num_kept` of every `group_size` neighbours of a weight [..., out, in], by learned logits.

    With pi the logits of a group's C candidates S and g Gumbel noise, training multiplies the weight by
    sum_k y_k S_k, y = softmax((kappa pi + g) / tau). The noise is one for the whole optimizer step, in every
    micro-batch and on every rank, so that the step is that of one loss. Evaluation keeps the candidate with the
    largest logit. The first backward of a step also adds the gradient of
    -lambda ||W * mask||^2 to the logits; W counts as a constant there.

    Args:
        name: Of the site, for the noise.
        weight: The weight it will be given: shape, device and dtype are taken.
        num_kept: Entries kept of each group.
        group_size: Neighbours along the last dim in a group.
        schedule: Of temperature, scale and regulariser.
        prior: From the loaded weight to the bool mask that logits start from; None starts at random.
        prior_strength: alpha in pi += alpha std(pi) (|S_k & prior| - N^2 / M).
    """

    slot: ClassVar[Slot] = Slot.MASK
    technique: ClassVar[str] = "mask_llm"
    candidates: Tensor
    """[C, M] of 0 and 1, in lexicographic order of the kept positions."""
    temperature: Tensor
    """(1,): tau."""
    scale: Tensor
    """(1,): kappa."""
    pull_left: Tensor
    """(1,): lambda of this step, until a backward has used it."""

    def __init__(
        self,
        name: str,
        weight: Tensor,
        num_kept: int,
        group_size: int,
        schedule: Schedule,
        *,
        prior: Callable[[Tensor], Tensor] | None = None,
        prior_strength: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_kept, self.group_size, self.schedule = num_kept, group_size, schedule
        self.prior, self.prior_strength = prior, prior_strength
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.logits = nn.Parameter(torch.empty(self._logits_shape(weight), dtype=dtype, device=weight.device))
        self._add_constants(dtype)
        # Constants keep their values on the CPU, where the weights may still be on meta.
        for key in ("temperature", "scale", "pull_left"):
            self.register_buffer(key, torch.zeros(1, dtype=dtype, device="cpu"), persistent=False)
        self.noise = Noise(f"mask_llm/{name}")
        self.set_progress(0.0)

    def _logits_shape(self, weight: Tensor) -> tuple[int, ...]:
        return (
            *weight.shape[:-1],
            weight.shape[-1] // self.group_size,
            math.comb(self.group_size, self.num_kept),
        )

    def _add_constants(self, dtype: torch.dtype) -> None:
        self.register_buffer("candidates", all_masks(self.num_kept, self.group_size).to(dtype), persistent=False)

    @torch.no_grad()
    def set_progress(self, progress: float) -> None:
        """Set tau, kappa and lambda for a share in [0, 1] of the run, and make the regulariser due."""
        for buffer, (first, last) in (
            (self.temperature, self.schedule.temperature),
            (self.scale, self.schedule.scale),
            (self.pull_left, (self.schedule.weight_regularisation, 0.0)),
        ):
            buffer.fill_(first + (last - first) * progress)

    def forward(self, weight: Tensor) -> Tensor:
        # Autocast would compute the mask in bf16.
        with torch.autocast(weight.device.type, enabled=False):
            if self.training:
                return self._drawn(weight)
            return torch.where(self.mask(), weight, 0.0)

    def _drawn(self, weight: Tensor) -> Tensor:
        draw = None if torch.compiler.is_compiling() else self._draw()
        if draw is not None and sampled_mask.covers(weight, self.logits, draw):
            return sampled_mask.drawn(weight, self.logits, draw, self.pull_left)
        return masked(weight, self.soft_mask(), self.pull_left)

    def _draw(self) -> Draw | None:
        """What a kernel needs to know; None on a GPU, where asking would wait for it."""
        if self.temperature.device.type != "cpu":
            return None
        return Draw(
            self.num_kept,
            self.group_size,
            scale=float(self.scale),
            temperature=float(self.temperature),
            key=int(self.noise.key),
            first=self.noise.first_row * self.logits.shape[1:].numel(),
        )

    def soft_mask(self) -> Tensor:
        """The sampled mask of this step [..., out, in], at least fp32."""
        scores = self._scores() / self.temperature
        # The softmax written out: over so few candidates, CPUs do one matmul faster than they do its sums.
        shares = (scores - scores.detach().amax(-1, keepdim=True)).exp()
        sums = shares @ nn.functional.pad(self.candidates, (0, 1), value=1.0)
        return (sums[..., :-1] / sums[..., -1:]).flatten(-2)

    def _scores(self) -> Tensor:
        return self.logits * self.scale + self.noise.gumbel(self.logits)

    def mask(self) -> Tensor:
        """The likeliest mask, bool [..., out, in]."""
        return self.candidates.bool()[self.logits.argmax(-1)].flatten(-2)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.logits.normal_(std=LOGITS_STD)

    @torch.no_grad()
    def initialise(self, weight: Tensor) -> None:
        if self.prior is None or not self.prior_strength:
            return
        self.logits.add_(self._lift(self.prior(weight)) * self.logits.std() * self.prior_strength)

    def _lift(self, prior: Tensor) -> Tensor:
        """By how many weights more than by chance what each logit stands for is in `prior`."""
        in_common = prior.unflatten(-1, (-1, self.group_size)).to(self.logits.dtype) @ self.candidates.T
        return in_common - self.num_kept**2 / self.group_size

    def pattern(self) -> tuple[int, int] | None:
        return None if self.training else (self.num_kept, self.group_size)  # a soft mask keeps all

    def extra_repr(self) -> str:
        return f"num_kept={self.num_kept}, group_size={self.group_size}"


class DrawnMaskStage(MaskLlmStage):
    """The same with a logit a weight: N draws without replacement in place of one among all ways to keep N of M.

    With pi the logits of a group's M weights, g Gumbel noise and s = kappa pi + g, the N largest s are such draws
    (Plackett-Luce, the distribution of MaskPro: Sun et al. 2025, arXiv:2506.12876). Training multiplies by the soft
    draws of Xie and Ermon 2019, arXiv:1901.10517: of N softmaxes p = softmax(s / tau) the sum, each after the first
    with s + log(1 - p) of the one before. Evaluation keeps the N largest logits.
    """

    def _logits_shape(self, weight: Tensor) -> tuple[int, ...]:
        return tuple(weight.shape)

    def _add_constants(self, dtype: torch.dtype) -> None:
        """It has none."""

    def _draw(self) -> None:
        """There is no kernel for it."""

    def soft_mask(self) -> Tensor:
        scores = self._scores().unflatten(-1, (-1, self.group_size))
        total = torch.zeros_like(scores)
        for _ in range(self.num_kept):
            draw = (scores / self.temperature).softmax(-1)
            total = total + draw
            rest = 1 - draw
            # What is drawn for sure is out, however far its score is above the others.
            is_out = rest <= 0
            scores = torch.where(is_out, -torch.inf, scores + torch.where(is_out, 1.0, rest).log())
        return total.flatten(-2)

    def mask(self) -> Tensor:
        groups = self.logits.unflatten(-1, (-1, self.group_size))
        kept = groups.sort(dim=-1, descending=True, stable=True).indices[..., : self.num_kept]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).flatten(-2)

    def _lift(self, prior: Tensor) -> Tensor:
        return prior.to(self.logits.dtype) - self.num_kept / self.group_size


class AnnealMasks(StepRule):
    """Moves temperature, scale and regulariser of every learned mask with the run."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def begin_step(self, context: StepContext) -> None:
        # The share of the run that is done never reaches 1, so the temperature stays above its last value.
        progress = min(1.0, context.step / max(1, context.num_steps))
        for _, site in iter_sites(self.model):
            stage = site.stage(Slot.MASK)
            if isinstance(stage, MaskLlmStage):
                stage.set_progress(progress)


def all_masks(num_kept: int, group_size: int) -> Tensor:
    """Every way to keep `num_kept` of `group_size`, bool [C, group_size], in lexicographic order."""
    ways = itertools.combinations(range(group_size), num_kept)
    return torch.tensor([[position in kept for position in range(group_size)] for kept in ways], device="cpu")
