"""Which family a parameter is of: what a wrong scale has in common."""

from __future__ import annotations

from torch import nn

from leanmill.core.experts import is_stacked_experts
from leanmill.core.names import clean_name
from leanmill.core.places import Kind, find_modules
from leanmill.core.stage import AROUND, is_added_tensor
from leanmill.parallel.naming import state_parameters


_KINDS: tuple[Kind, ...] = ("router", "norm", "attention", "mlp")
_ADDED = ("stages", "inputs")


def families_of(model: nn.Module, plain: set[str]) -> dict[str, str]:
    """Return the family of every parameter of a prepared model, by its name in states.

    Of the plain model: `router`, `norm`, `experts`, `attention`, `mlp`, `embedding` and `head`. Of what techniques
    added: the slot (`delta`, `mask`, `quant`), `around`, or `branch`.

    Args:
        model: The model, its techniques in place.
        plain: Names of the parameters that it had before.
    """
    places = {kind: [path for path, _, _ in find_modules(model, kind)] for kind in _KINDS}
    experts = [path for path, module in model.named_modules() if is_stacked_experts(module)]
    inside = {"router": places["router"], "norm": places["norm"], "experts": experts}
    inside |= {"attention": places["attention"], "mlp": places["mlp"]}
    # Of tied weights the last one counts.
    ends = {"head": model.get_output_embeddings(), "embedding": model.get_input_embeddings()}  # type: ignore[operator]
    of_ends = {
        id(parameter): name
        for name, module in ends.items()
        if module is not None
        for parameter in module._parameters.values()
        if parameter is not None
    }
    found: dict[str, str] = {}
    for name, parameter in state_parameters(model):
        if clean_name(name) not in plain or is_added_tensor(name):
            found[name] = _of_added(name.split("."))
            continue
        within = (kind for kind, paths in inside.items() if any(name.startswith(f"{path}.") for path in paths))
        found[name] = of_ends.get(id(parameter)) or next(within, "other")
    return found


def _of_added(parts: list[str]) -> str:
    for place in _ADDED:
        if place in parts[:-1]:
            return parts[parts.index(place) + 1]
    return AROUND if AROUND in parts else "branch"
