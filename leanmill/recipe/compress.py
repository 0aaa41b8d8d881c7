"""The root of a compression recipe: passes over a model that exists. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from leanmill.core.config import Config
from leanmill.core.errors import ConfigError
from leanmill.core.passes import PassConfig
from leanmill.core.registry import parse_pass
from leanmill.core.surgery import lost_further
from leanmill.data.config import DataConfig
from leanmill.models.config import ModelConfig


class CalibrationConfig(Config):
    """Rows of the training data that passes look at."""

    num_rows: int = Field(default=128, ge=1)
    """Rows of `data.sequence_length` tokens over all ranks; the methods' papers take 128."""
    rows_per_batch: int = Field(default=4, ge=1)
    """Rows that go through a block at once."""


class CalibratedRecipe(Config):
    """What looks at a model that exists with calibration text."""

    seed: int = Field(default=0, ge=0)
    """Seed of the choice of rows."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is cuda where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What blocks compute in while calibration rows pass; weights are solved in fp32 and written in the
    dtype they were stored in. `auto` is bf16 where the device multiplies it natively."""
    model: ModelConfig
    """The model, by its `path`."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Where calibration rows come from; without a tokenizer it is the model's own."""
    calibration: CalibrationConfig = Field(default_factory=CalibrationConfig)
    """How many rows."""

    @model_validator(mode="after")
    def _has_a_model(self) -> Self:
        if self.model.path is None:
            raise ConfigError("calibration looks at a model that exists; set model.path to its folder or hub name")
        if self.model.task != "causal_lm":
            raise ConfigError(
                f"passes look at causal models a block at a time, and model.task={self.model.task}; train with "
                f"techniques instead, e.g. {{type: nm_sparsity}} or {{type: int_quant}}"
            )
        return self


class CompressRecipe(CalibratedRecipe):
    """One-shot compression of a model with calibration text, for `leanmill compress`."""

    passes: list[Annotated[SerializeAsAny[PassConfig], BeforeValidator(parse_pass)]] = Field(min_length=1)
    """Passes, each `{type: name, ...}`, in the order they run."""

    @model_validator(mode="after")
    def _keeps_what_is_written(self) -> Self:
        if problem := lost_further(self.passes):
            raise ConfigError(problem)
        return self
