"""The plain model of one that techniques are attached to."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.core.names import state_name
from leanmill.core.rules import state_of
from leanmill.core.sites import iter_sites
from leanmill.export.activations import settle_activations
from leanmill.export.folding import check_mergeable
from leanmill.export.folding import fold as fold_in_place
from leanmill.export.formats import Activations
from leanmill.export.report import ExportReport
from leanmill.export.run import export_rebuilt
from leanmill.integrations.attached import Attached, attached_to
from leanmill.parallel.deepspeed_state import whole_parameter
from leanmill.parallel.naming import state_buffers, state_parameters
from leanmill.parallel.tensors import full
from leanmill.trainer.rebuild import Rebuilt, fill_trained


def fold(model: Any, *, activations: Activations = "trained") -> Any:
    """Return the plain model that computes what `model` does: stages in its weights, adapters merged.

    A new model in fp32 on the CPU; `model` stays as it is and may train on. A collective where it is sharded.

    Args:
        model: One that `attach` was called on, wrapped or not.
        activations: `float` leaves out that techniques round the input of layers, which a plain model does not.

    Raises:
        ConfigError: Nothing is attached, or no plain model computes the same.
    """
    attached = attached_to(model)
    return plain_model(attached, whole_state(attached.model), activations)


def plain_model(attached: Attached, state: Mapping[str, Tensor], activations: Activations) -> Any:
    """Build the plain model of an attached one whose tensors are `state`, in fp32 on the CPU.

    Raises:
        ConfigError: See `fold`.
    """
    model = rebuild(attached, state).model
    _settle(model, activations)
    fold_in_place(model)
    return model


def check_plain(attached: Attached, activations: Activations) -> None:
    """Refuse what `fold` would, before anything is trained.

    Raises:
        ConfigError: See `fold`.
    """
    model = attached.on_meta()
    check_mergeable(model)
    _settle(model, activations)


def _settle(model: Any, activations: Activations) -> None:
    rounding = {
        stage.technique for _, site in iter_sites(model) for stage in site.input_stages() if not stage.is_cancelled
    }
    if rounding and activations == "trained":
        raise ConfigError(
            f"{' and '.join(sorted(rounding))} round the input of layers, which a plain model does not repeat; give "
            f"activations='float' for a model that computes with float activations, or call "
            f"leanmill.integrations.export with a packing whose layers round too"
        )
    settle_activations(model, "float")


def export(
    model: Any, out: str | Path, *, to: str = "hf", packing: str = "none", activations: Activations = "trained"
) -> ExportReport:
    """Write the trained model as a folder others load, in any format of `leanmill export`, read back and compared.

    Args:
        model: One that `attach` was called on, not sharded.
        out: A new folder.
        to: Format.
        packing: Of weights in `hf`.
        activations: See `fold`.

    Raises:
        ConfigError: It has no such form, or `out` is there.
        RunError: What was loaded back differs; `out` is not created.
    """
    from leanmill.core.folders import check_is_new

    check_is_new(Path(out))
    attached = attached_to(model)
    with tempfile.TemporaryDirectory() as folder:
        if attached.tokenizer is not None:
            attached.tokenizer.save_pretrained(folder)
        rebuilt = rebuild(attached, whole_state(attached.model), Path(folder) if attached.tokenizer else None)
        return export_rebuilt(rebuilt, Path(out), "the attached model", to=to, packing=packing, activations=activations)


def rebuild(attached: Attached, state: Mapping[str, Tensor], tokenizer_dir: Path | None = None) -> Rebuilt:
    """Build the model of an attached one once more, on the CPU and unwrapped, with `state` as its tensors."""
    model = attached.plain_on_meta()
    filled = fill_trained(
        attached.recipe,
        model,
        state,
        rule_states=state_of(attached.installed.step_rules),
        step=attached.step,
        num_steps=attached.num_steps,
        source="the attached model",
    )
    return Rebuilt(
        model=model, recipe=attached.recipe, step=attached.step, versions={}, tokenizer_dir=tokenizer_dir, **filled
    )


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, whole, on the CPU; masters where DeepSpeed has some."""
    state = {name: whole_parameter(parameter).cpu() for name, parameter in state_parameters(model)}
    return state | {name: full(buffer.detach()).cpu() for name, buffer in state_buffers(model)}


def state_of_names(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what of a state dict that a trainer gathered belongs to `model`, by the names of `whole_state`."""
    known = {name for name, _ in state_parameters(model)} | {name for name, _ in state_buffers(model)}
    named = {state_name(name): value.detach().cpu() for name, value in given.items()}
    return {name: value for name, value in named.items() if name in known}
