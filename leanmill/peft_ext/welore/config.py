"""Configuration of WeLore: the pass that makes pairs, and the technique that trains them. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.errors import ConfigError
from leanmill.core.surgery import Surgeon, SurgeryConfig
from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class WeLore(SurgeryConfig):
    """Replace weights by the two factors of their leading singular vectors, each of a rank of its own.

    Jaiswal et al. 2024, arXiv:2407.11239. One threshold on the singular values of all weights, those of each on a scale
    from 0, its least, to 1, its largest, says which go; a weight that loses many becomes a pair, the others stay whole.
    """

    type: Literal["welore"] = "welore"
    """Name of the pass."""
    rank_reduction: float = Field(gt=0, lt=1)
    """Share of the singular values of all linear weights of the blocks that lies below the threshold."""
    least_reduction: float = Field(default=0.5, ge=0, lt=1)
    """A weight becomes a pair where more than this share of its own singular values goes. A square weight takes less
    memory as a pair from 0.5 on."""

    @property
    def looks(self) -> bool:
        return True

    @property
    def reads_text(self) -> bool:
        return False

    def surgeon(self, seed: int) -> Surgeon:
        from leanmill.peft_ext.welore.surgeon import WeLoreSurgeon

        return WeLoreSurgeon(rank_reduction=self.rank_reduction, least_reduction=self.least_reduction)


class WeLoreTuning(TechniqueConfig):
    """Train the pairs that the pass `welore` made, and norms; what stayed whole rests (arXiv:2407.11239)."""

    type: Literal["welore"] = "welore"
    """Name of the technique."""
    norms: bool = True
    """Train norms too, as the authors' code does."""

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Choose what trains, and freeze the rest.

        Raises:
            ConfigError: The model has no pairs.
        """
        from leanmill.core.parameters import ParamRule
        from leanmill.core.places import find_modules

        pairs = paired(sites.model.config)
        if not pairs:
            raise ConfigError(
                "welore trains weights that are pairs of factors, and this model has none; make some with "
                "`leanmill compress` and the pass {type: welore, rank_reduction: 0.5}"
            )
        names = {
            name
            for path, module in sites.model.named_modules()
            if any(path.endswith(pair) for pair in pairs)
            for name in (f"{path}.{key}" for key, _ in module.named_parameters())
        }
        if self.norms:
            for path, _, module in find_modules(sites.model, "norm"):
                names |= {f"{path}.{key}" for key in module._parameters}
        rule = ParamRule(technique=self.type, match=names.__contains__, trainable=True)
        return Installation(freeze_base=True, param_rules=(rule,))


def paired(config: object) -> list[str]:
    """Return the ends of the paths of linear layers that are pairs, such as `layers.3.mlp.up_proj`."""
    ranks: dict[str, list[int]] = getattr(config, "rank_by_linear", None) or {}
    return [f"layers.{layer}.{name}" for name in sorted(ranks) for layer, rank in enumerate(ranks[name]) if rank]
