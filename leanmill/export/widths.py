"""One width of weights that were trained in several."""

from __future__ import annotations

from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.core.sites import iter_sites


def switch_widths(model: Any, num_bits: int) -> None:
    """Let every weight that was trained in several widths be rounded to `num_bits`.

    Args:
        model: The trained model, its sites in place; changed.
        num_bits: Of a weight.

    Raises:
        ConfigError: No weight was trained in several widths, or one not in this.
    """
    stages = [stage for _, site in iter_sites(model) for stage in site.weight_stages() if stage.trained_bits()]
    if not stages:
        raise ConfigError(
            f"--bits {num_bits}: no weight of this model was trained in several widths; leave it out, or train with "
            f"int_quant.switch_bits"
        )
    for stage in stages:
        if num_bits not in stage.trained_bits():
            allowed = ", ".join(map(str, stage.trained_bits()))
            raise ConfigError(f"--bits {num_bits}: {stage.technique} trained widths {allowed}; type one of them")
        stage.switch_to(num_bits)
