"""Configuration of N:M sparsity. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from leanmill.core.config import Config
from leanmill.core.errors import ConfigError
from leanmill.core.technique import ALL_TASKS, Installation, InstallContext, ModelTask, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.site import Site
    from leanmill.core.sites import Sites
    from leanmill.sparse.schedule import MaskSchedule


_FALL = {"linear": 1.0, "exponential": 10.0}
"""Default rates. The paper's ViT falls by exp(-1e-4) in each of 109,000 steps."""
_NUM_STAGES = 4
"""Of the paper's geometric decay."""
LARGEST_GROUP = 256
"""That masks are computed for; see `leanmill.kernels.nm_mask`."""


class Progressive(Config):
    """The mask comes step by step (Progressive Gradient Flow: Bambhaniya et al. 2024, arXiv:2402.04744).

    First the run is dense, then the mask tightens, and at the end it is the plain N:M mask, if only in the last step.
    """

    decay: Literal["exponential", "linear", "stepwise", "geometric"] = "exponential"
    """What tightens. The mask (MdGf): pruned weights are multiplied with a factor that falls from 1, `linear` to
    0 or as an `exponential`. Or the structure (SdGf), in stages of equal length: `stepwise` (M - 1):M, M/2:M, M/4:M
    down to N:M, `geometric` 8N:8M, 4N:4M, 2N:2M, N:M."""
    dense_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the run, from its start, that is dense."""
    fine_tune_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the run, to its end, under the plain N:M mask; of `stepwise` and `geometric` beside their last stage."""
    rate: float | None = Field(default=None, gt=0)
    """How fast `linear` and `exponential` fall: 1 - rate x and exp(-rate x), x from 0 to 1 between the two shares. None
    is 1 and 10. The paper's coefficient is rate / steps in between."""
    num_stages: int | None = Field(default=None, ge=2, le=8)
    """Stages of `geometric`, the first with groups of M 2^(stages - 1), which must divide weights too; None is 4."""

    @model_validator(mode="after")
    def _fits_into_the_run(self) -> Progressive:
        if self.dense_share + self.fine_tune_share >= 1:
            raise ConfigError(
                f"progressive.dense_share {self.dense_share:g} and fine_tune_share {self.fine_tune_share:g} leave "
                f"nothing of the run in between; their sum must be below 1, e.g. dense_share: 0.1"
            )
        for key, decays in (("rate", ("linear", "exponential")), ("num_stages", ("geometric",))):
            if getattr(self, key) is not None and self.decay not in decays:
                raise ConfigError(
                    f"progressive.{key} belongs to decay: {' and '.join(decays)}; remove it, or choose such a decay"
                )
        return self

    def schedule(self, num_kept: int, group_size: int) -> MaskSchedule:
        """Return the schedule towards `num_kept` of `group_size`."""
        from leanmill.sparse.schedule import Interval, MaskDecay, StructureDecay, geometric, stepwise

        interval = Interval(begin=self.dense_share, end=1 - self.fine_tune_share)
        if self.decay == "linear" or self.decay == "exponential":
            rate = self.rate or _FALL[self.decay]
            return MaskDecay(num_kept=num_kept, group_size=group_size, interval=interval, form=self.decay, rate=rate)
        if self.decay == "stepwise":
            return StructureDecay(stages=stepwise(num_kept, group_size), interval=interval)
        return StructureDecay(stages=geometric(num_kept, group_size, self.num_stages or _NUM_STAGES), interval=interval)


class NMSparsity(TechniqueConfig):
    """Keep the N largest of every M weights along the contraction dim (Zhou et al. 2021, arXiv:2102.04010).

    The mask is computed from the magnitudes at every forward and has no state. N counts weights that
    are *kept*, as in the paper; some pruning code counts zeros.
    """

    type: Literal["nm_sparsity"] = "nm_sparsity"
    """Name of the technique."""
    num_kept: int = Field(default=2, ge=1)
    """Weights kept of each group (N)."""
    group_size: int = Field(default=4, ge=2, le=64)
    """Neighbours along the last dim in a group (M); it must divide that dim of every target."""
    transposable: bool = False
    """Keep two of every row and column of each 4 x 4 tile (Hu et al. 2024, arXiv:2404.01847), so that the weight and
    its transpose, which backward multiplies with, are both 2:4."""
    gradient: Literal["straight_through", "sr_ste", "masked"] = "sr_ste"
    """`straight_through` hands the gradient of the masked weight to the dense one; `sr_ste` adds
    `decay` x the pruned weights to it; `masked`, the default beside `progressive`, multiplies it with the mask, so that
    less and less flows into pruned weights as they fade."""
    decay: float = Field(default=2e-4, ge=0)
    """Pull of `sr_ste` on pruned weights (lambda in the paper), added once an optimizer step."""
    decay_on: Literal["gradient", "update", "weight"] = "gradient"
    """Where the decay goes in. `gradient`, as published: through both moments of Adam. `update`: beside the first
    moment, so that only its size is adapted (AST: Huang et al. 2025, arXiv:2407.20584). `weight`: beside AdamW's step,
    times the learning rate, so that neither moment sees it. The latter two are of AdamW, with 4 bytes a weight more."""
    decay_warmup: float = Field(default=0.0, ge=0, le=1)
    """Share of the run over which `decay` grows from 0, linearly; 0.25 in AST."""
    dense_at_end: float = Field(default=0.0, ge=0, lt=1)
    """Share of the run, to its end, that trains dense, as the model then is in the end (Hu et al. 2024)."""
    log_flips: bool = False
    """Log `flip_rate`, the share of mask bits that a step changes (Hu et al. 2024), of the steps that are logged; while
    weights are dense, of the mask that they would have."""
    progressive: Progressive | None = None
    """Let the mask come step by step; None has it from the first step on."""
    targets: list[str] | None = None
    """Patterns of weights to take; None takes every linear and expert weight except the head."""
    exclude: list[str] = Field(default_factory=list)
    """Patterns of weights to leave out again."""

    def model_tasks(self) -> frozenset[ModelTask]:
        """Return all: weights are weights."""
        return ALL_TASKS

    def holds_where_matmuls_are_shared(self) -> bool:
        """Return whether no rule looks at masks of weights that ranks have parts of."""
        return self.decay_on == "gradient" and not self.log_flips

    def holds_where_blocks_are_apart(self) -> bool:
        """Return whether no rule looks at masks, which are those of one stage: they come from weights."""
        return self.decay_on == "gradient" and not self.log_flips

    def holds_where_rows_are_shared(self) -> bool:
        """Return True: masks come from weights and gradients, which are whole."""
        return True

    def holds_where_workers_drift(self) -> bool:
        """Return True: masks come from the weights that travel."""
        return True

    @model_validator(mode="before")
    @classmethod
    def _flows_through_the_mask(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("progressive") is not None and "gradient" not in raw:
            return raw | {"gradient": "masked"}
        return raw

    @model_validator(mode="after")
    def _keeps_fewer_than_all(self) -> NMSparsity:
        if self.num_kept >= self.group_size:
            raise ConfigError(
                f"num_kept {self.num_kept} of group_size {self.group_size} prunes nothing; "
                f"num_kept must be 1 to {self.group_size - 1}, or remove nm_sparsity"
            )
        return self

    @model_validator(mode="after")
    def _has_one_decay_and_one_end(self) -> NMSparsity:
        for key in ("decay_on", "decay_warmup"):
            if self.gradient != "sr_ste" and getattr(self, key) != type(self).model_fields[key].default:
                raise ConfigError(
                    f"nm_sparsity.{key} is of gradient: sr_ste, got gradient: {self.gradient}; remove it, or set "
                    f"gradient: sr_ste"
                )
        if self.dense_at_end and self.progressive is not None:
            raise ConfigError(
                f"nm_sparsity.progressive ends under the plain mask, and dense_at_end={self.dense_at_end:g} without "
                f"one; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _has_a_kernel(self) -> NMSparsity:
        if self.transposable and (self.num_kept, self.group_size) != (2, 4):
            raise ConfigError(
                f"nm_sparsity.transposable keeps 2 of 4, not {self.num_kept} of {self.group_size}; set num_kept: 2 and "
                f"group_size: 4, or remove it"
            )
        if self.progressive is not None:
            patterns = self.progressive.schedule(self.num_kept, self.group_size).patterns()
            largest = max(size for _, size in patterns)
            if largest > LARGEST_GROUP:
                most = (LARGEST_GROUP // self.group_size).bit_length()
                raise ConfigError(
                    f"nm_sparsity.progressive: {len(patterns)} stages of geometric decay towards {self.num_kept}:"
                    f"{self.group_size} begin with groups of {largest}, and {LARGEST_GROUP} are allowed; set "
                    f"num_stages: {most}"
                )
            if self.transposable and len(patterns) > 1:
                raise ConfigError(
                    f"nm_sparsity.transposable has masks of 2:4 alone, and decay {self.progressive.decay} goes through "
                    f"others; set decay: exponential, or remove transposable"
                )
        return self

    def reads_optimizer_state(self) -> bool:
        """Masks are looked at beside the optimizer, which is given the pull on pruned weights."""
        return self._pulls or self.log_flips

    def reads_second_moments(self) -> str | None:
        return "nm_sparsity.decay_on=gradient" if self._pulls else None

    @property
    def _pulls(self) -> bool:
        return self.gradient == "sr_ste" and self.decay > 0 and self.decay_on != "gradient"

    def _schedule(self) -> MaskSchedule | None:
        from leanmill.sparse.schedule import DenseAtTheEnd

        if self.dense_at_end:
            return DenseAtTheEnd(num_kept=self.num_kept, group_size=self.group_size, dense_share=self.dense_at_end)
        return None if self.progressive is None else self.progressive.schedule(self.num_kept, self.group_size)

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a mask stage on every target.

        Raises:
            ConfigError: `group_size`, or a larger group of `progressive`, does not divide the last dim of a target.
        """
        import torch

        from leanmill.sparse.nm_sparsity.stage import NMSparsityStage

        selected = sites.select(self.targets, self.exclude)
        schedule = self._schedule()
        for site in selected:
            self._check(site, schedule)
        decay = self.decay if self.gradient == "sr_ste" and not self._pulls else 0.0
        masks_gradient = self.gradient == "masked"

        def stage(site: Site) -> NMSparsityStage:
            weight = site.raw_weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            return NMSparsityStage(
                self.num_kept,
                self.group_size,
                decay,
                decay_warmup=self.decay_warmup,
                schedule=schedule,
                masks_gradient=masks_gradient,
                transposable=self.transposable,
                device=weight.device,
                dtype=dtype,
            )

        sites.put(selected, stage)
        return self._installation(sites, selected, schedule)

    def _installation(self, sites: Sites, selected: Sequence[Site], schedule: MaskSchedule | None) -> Installation:
        from leanmill.core.parameters import ParamRule, ParamSettings
        from leanmill.sparse.nm_sparsity.rule import FollowMasks, FollowSchedule
        from leanmill.sparse.schedule import WarmedUp

        if not self.reads_optimizer_state():
            rule = FollowSchedule(sites.model, schedule)
            has_rule = schedule is not None or (self.gradient == "sr_ste" and self.decay > 0)
            return Installation(step_rules=(rule,) if has_rule else ())
        masks = FollowMasks(
            sites.model,
            schedule,
            names=[site.site_name for site in selected],
            pull=WarmedUp(strength=self.decay, share=self.decay_warmup) if self._pulls else None,
            counts_flips=self.log_flips,
            transposable=self.transposable,
        )
        if not self._pulls:
            return Installation(step_rules=(masks,))
        assert self.decay_on != "gradient"
        pulled = frozenset(site.weight_name for site in selected)
        settings = ParamSettings(pull=self.decay_on)
        rules = (ParamRule(technique=self.type, match=pulled.__contains__, settings=settings),)
        return Installation(step_rules=(masks,), param_rules=rules)

    def _check(self, site: Site, schedule: MaskSchedule | None) -> None:
        name, shape = site.site_name, list(site.raw_weight.shape)
        if shape[-1] % self.group_size or (self.transposable and shape[-2] % self.group_size):
            which = "both dims" if self.transposable else "the last dim"
            raise ConfigError(
                f"{name}: group_size {self.group_size} does not divide {which} of its weight {shape}; add {name!r} to "
                f"nm_sparsity.exclude or choose a group_size that divides {shape[-1]}"
            )
        largest = max(size for _, size in (schedule.patterns() if schedule is not None else [(0, self.group_size)]))
        if shape[-1] % largest:
            raise ConfigError(
                f"{name}: decay geometric begins with groups of {largest}, which do not divide the last dim of its "
                f"weight {shape}; set nm_sparsity.progressive.num_stages to fewer, or add {name!r} to exclude"
            )
