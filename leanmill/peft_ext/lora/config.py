"""Configuration of low-rank adapters. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import ALL_TASKS, Installation, InstallContext, ModelTask, TrainedTechniqueConfig


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from leanmill.core.facets import StoredFactors
    from leanmill.core.site import Site
    from leanmill.core.sites import Sites


class Lora(TrainedTechniqueConfig):
    """Freeze the model and train low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    type: Literal["lora"] = "lora"
    """Name of the technique."""
    rank: int = Field(default=16, ge=1, le=65_536)
    """Inner size r of the two factors, at most the longer side of each weight."""
    alpha: float = Field(default=32.0, gt=0)
    """Numerator of the scaling alpha / r."""
    where: Literal["weight", "branch"] = "weight"
    """`weight` trains W + s B A, which masks and quantisers then see; `branch` adds s B (A x) to the
    layer's output through Hugging Face PEFT (linear layers only)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of a branch."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)."""
    init: Literal["kaiming", "gaussian", "stored"] = "kaiming"
    """How A starts: Kaiming-uniform as PEFT does, or normal with standard deviation 1 / r. B starts
    at zero, so step 0 is the base model. `stored` starts both from what the pass `lq_lora` took out of each weight of
    the model in `model.path`, so step 0 is nearly the model before that pass."""
    targets: list[str] | None = None
    """Patterns of weights to take; None takes every linear and expert weight except the head."""
    exclude: list[str] = Field(default_factory=list)
    """Patterns of weights to leave out again."""

    def model_tasks(self) -> frozenset[ModelTask]:
        """Return all: weights are weights."""
        return ALL_TASKS

    def holds_where_matmuls_are_shared(self) -> bool:
        """Return whether nothing is drawn in forward: ranks with parts of an input would drop the same places of it."""
        return self.dropout == 0

    def holds_where_blocks_are_apart(self) -> bool:
        """Return whether nothing is drawn in forward; factors are beside their weight, on one stage."""
        return self.dropout == 0

    def holds_where_rows_are_shared(self) -> bool:
        """Return whether nothing is drawn in forward: ranks would drop the same places of their parts."""
        return self.dropout == 0

    def holds_where_workers_drift(self) -> bool:
        """Return True: adapters are weights that train, and travel alone."""
        return True

    @property
    def scaling(self) -> float:
        """Factor s of the product B A."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @model_validator(mode="after")
    def _dropout_needs_an_input(self) -> Lora:
        if self.where == "weight" and self.dropout > 0:
            raise ConfigError(
                f"lora.dropout {self.dropout} drops inputs of a branch, and `where: weight` has none; "
                f"set dropout: 0 or where: branch"
            )
        return self

    @model_validator(mode="after")
    def _stored_factors_are_of_weights(self) -> Lora:
        if self.where == "branch" and self.init == "stored":
            raise ConfigError(
                "lora.init=stored fills the factors inside of weights; set where: weight, or start from the folder "
                "itself: {type: peft, path: <model.path>/adapter}"
            )
        return self

    def adds_branches(self) -> bool:
        """`where: branch` does."""
        return self.where == "branch"

    def _check_rank(self, site: Site) -> None:
        *_, num_out, num_in = site.raw_weight.shape
        # Above the shorter side factors are wasteful; a recipe may mean it for the larger of its weights.
        if self.rank > max(num_out, num_in):
            raise ConfigError(
                f"lora.rank {self.rank} is above both sides of {site.site_name}, {num_out} x {num_in}; "
                f"set rank: {min(num_out, num_in)} or less, or add {site.site_name!r} to lora.exclude"
            )

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put delta stages on every target, or arrange for branches to be wrapped around them."""
        selected = sites.select(self.targets, self.exclude)
        for site in selected:
            self._check_rank(site)
        if self.where == "branch":
            from leanmill.peft_ext.lora.branch import branches

            assert self.init != "stored"
            options = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
            return branches(selected, init=self.init, options={**options, "use_rslora": self.use_rslora})
        from leanmill.peft_ext.lora.start import stage_of

        stored = self._stored([site.site_name for site in selected], context)
        for site in selected:
            tied = sites.tied_to(site)
            if tied:
                raise ConfigError(
                    f"{site.site_name} and {tied[0]} are tied (one parameter) and cannot get adapters of their own "
                    f"inside the weight; add both to lora.exclude or set model.config.tie_word_embeddings: false"
                )
            site.put(stage_of(site, self.rank, self.scaling, self.init, stored.get(site.site_name)))
        return Installation(freeze_base=True)

    def _stored(self, selected: Sequence[str], context: InstallContext) -> Mapping[str, StoredFactors]:
        """Return the factors to start from, by layer; nothing where there are none or they will be overwritten."""
        if self.init != "stored" or context.stored_adapter is None:
            return {}
        stored = context.stored_adapter()
        missing, left = sorted(set(selected) - set(stored)), sorted(set(stored) - set(selected))
        if missing:
            raise ConfigError(
                f"lora.init=stored, and the folder's adapter has nothing for {missing[0]} ({len(missing)} of "
                f"{len(selected)} targets); add them to lora.exclude, or to another lora with init: kaiming"
            )
        if left:
            raise ConfigError(
                f"lora.init=stored, and the folder's adapter holds a part of {left[0]}, which lora.targets leave out "
                f"({len(left)} layers); take them too"
            )
        found = next(iter(stored.values())).rank
        if found != self.rank:
            raise ConfigError(f"lora.rank={self.rank}, and the folder's adapter has rank {found}; set rank: {found}")
        return stored
