"""SqueezeLLM. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from leanmill.core.passes import SensitivePassConfig, SensitiveSolver


class SqueezeLlm(SensitivePassConfig):
    """Give each row the levels that its sensitive weights want (Kim et al. 2023, arXiv:2306.07629).

    Levels are the centres of weighted k-means over a row's weights, each weighted by its mean squared gradient over
    calibration rows, the diagonal of the Fisher information. A few outliers and a few weights of largest sensitivity
    stay as they are. Gradients take memory for the whole model in fp32 and once more for the layers' weights.
    """

    type: Literal["squeezellm"] = "squeezellm"
    """Name of the pass."""
    weight_bits: int = Field(default=4, ge=1, le=8)
    """Bits b of a weight: each row has at most 2^b levels, beside what stays as it is."""
    outlier_share: float = Field(default=0.0045, ge=0, lt=1)
    """Share of a layer's weights, those of largest magnitude, that stay as they are; this and the next are those of the
    authors' code."""
    sensitive_share: float = Field(default=0.0005, ge=0, lt=1)
    """Share of a layer's weights, those of largest sensitivity, that stay as they are."""
    iterations: int = Field(default=50, ge=1)
    """Of k-means at most; it ends when no weight changes its level."""

    def solver(self) -> SensitiveSolver:
        from leanmill.quant.squeezellm.solver import SqueezeSolver

        return SqueezeSolver(
            num_bits=self.weight_bits,
            outlier_share=self.outlier_share,
            sensitive_share=self.sensitive_share,
            iterations=self.iterations,
        )
