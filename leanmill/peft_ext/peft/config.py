"""Configuration of PEFT's methods. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext, TrainedTechniqueConfig
from leanmill.peft_ext.peft.folder import AdapterFolder
from leanmill.peft_ext.peft.methods import CHANGES_BASE, METHODS, STARTS
from leanmill.peft_ext.peft.options import check_method, check_options


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class Peft(TrainedTechniqueConfig):
    """Freeze the model and train an adapter of any method of Hugging Face PEFT beside its layers.

    Options of the method stand next to `method`, by PEFT's names: `{type: peft, method: vera, r: 64}`.
    """

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})

    type: Literal["peft"] = "peft"
    """Name of the technique."""
    method: Literal[
        "beft", "boft", "bottleneck", "c3a", "core_lora", "deft", "delora", "fourierft", "glora", "gralora", "hira",
        "hra", "ia3", "lily", "ln_tuning", "loha", "lokr", "lora", "miss", "moe_lora", "mos", "nola", "oft",
        "peanut", "psoft", "pvera", "randlora", "rank_lora", "road", "shira", "supertuning", "tinylora",
        "trainable_tokens", "unilora", "vblora", "vera", "waveft",
    ] = "lora"  # fmt: skip
    """PEFT's name of the method, in lower case."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the method, by PEFT's names; a recipe may write them beside `method` instead."""
    gradient_step: float | None = Field(default=None, gt=0)
    """For `method: core_lora` with `variant: lora_sb`, which needs it: learning rate of the step of full fine-tuning
    that the adapter starts from. The paper takes that of the run over its share of warm-up and its steps."""
    targets: list[str] | None = None
    """Patterns of the layers to wrap; None takes every linear layer except the head, and every norm or the
    embedding for methods that wrap those."""
    exclude: list[str] = Field(default_factory=list)
    """Patterns of layers to leave out again."""
    path: str | None = None
    """Folder of an adapter that PEFT wrote, which training starts from. Method, options and layers are its own."""

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        if "method" in raw:
            check_method(raw["method"])
        elif raw.get("path") is not None:
            return _as_in_its_folder(raw)
        beside = {key: value for key, value in raw.items() if key not in cls.model_fields}
        options = raw.get("options", {})
        if not beside or not isinstance(options, Mapping):
            return raw
        twice = sorted(beside.keys() & options.keys())
        if twice:
            raise ConfigError(f"peft.{twice[0]} stands beside `method` and in peft.options; keep one")
        return {key: value for key, value in raw.items() if key not in beside} | {"options": {**options, **beside}}

    @model_validator(mode="after")
    def _belong_to_the_method(self) -> Peft:
        given = {name: value for name, value in self.options.items() if (name, value) != ("bias", "none")}
        check_options(self.method, given)
        is_sb = self.options.get("variant") == "lora_sb" and self.path is None
        if is_sb != (self.gradient_step is not None):
            raise ConfigError(
                "peft.gradient_step is missing: variant: lora_sb starts from a step of full fine-tuning of this "
                "learning rate; add e.g. gradient_step: 1e-3"
                if is_sb
                else "peft.gradient_step belongs to method: core_lora with variant: lora_sb that starts anew; remove it"
            )
        start = self.options.get("init_lora_weights", True)
        if isinstance(start, str) and not start.startswith(STARTS):
            raise ConfigError(
                f"peft.init_lora_weights={start} needs data or another base; use true, {', '.join(STARTS)} or "
                f"pissa_niter_N"
            )
        return self

    def adds_branches(self) -> bool:
        """All methods wrap layers."""
        return True

    def changes_base(self) -> bool:
        """Starts that move a part of each weight into the adapter do."""
        return str(self.options.get("init_lora_weights", "")).startswith(CHANGES_BASE)

    def reads_base(self) -> bool:
        """PEFT's methods may: starts, norms and rotations of weights do."""
        return True

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Arrange for PEFT to wrap the selected layers.

        Raises:
            ConfigError: PEFT refuses the options, a pattern matches nothing, or a layer cannot be wrapped.
        """
        from leanmill.peft_ext.peft.inject import adapters

        method = METHODS[self.method]
        installation = adapters(
            sites,
            method=self.method,
            options={name: value for name, value in self.options.items() if name != "bias"},
            targets=self.targets,
            exclude=self.exclude,
            wraps=method.wraps,
            reads_weight=method.reads_weight or bool(self.options.get("use_dora")),
            starts_from_weight=method.starts_from_weight or bool(self.options.get("use_dora")),
            changes_base=self.changes_base(),
            seed=context.seed or 0,
            start=self._start(context),
        )
        if method.routes_tokens:
            from leanmill.peft_ext.peft.routing import balanced

            return balanced(installation, self.options, context.ledger)
        if method.moves_ranks:
            from leanmill.peft_ext.peft.ranks import with_moving_ranks

            return with_moving_ranks(installation, self.options, sites.model, context.seed or 0)
        if self.gradient_step is None:
            return installation
        from leanmill.peft_ext.peft.gradient_start import GradientStart

        return replace(installation, step_rules=(GradientStart(sites.model, self.gradient_step),))

    def _start(self, context: InstallContext) -> str | None:
        """Return the folder that adapters start from, once it fits; None where they start anew or are loaded."""
        if self.path is None or context.check_base is None:
            return None
        folder = AdapterFolder.read(self.path)
        folder.check(self.path, self.method, self.options)
        if folder.base is not None:
            context.check_base(folder.base, f"peft.path={self.path}")
        return self.path


def _as_in_its_folder(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Write out what the adapter in `path` is, so that the recipe says it where the folder is gone."""
    folder = AdapterFolder.read(str(raw["path"]))
    others = [key for key in raw if key not in Peft.model_fields or key == "options"]
    if others:
        raise ConfigError(f"peft.{others[0]} stands beside peft.path, whose adapter has its own options; leave it out")
    return {"targets": folder.targets, **raw, "method": folder.method, "options": dict(folder.options)}
