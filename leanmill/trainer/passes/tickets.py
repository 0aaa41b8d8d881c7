"""What each layer of a trained ticket owes to training, to what it began as, and to where its zeros are.

A layer at a time gets other values, the others stay as trained, and nothing is trained again: Zhang et al. 2019,
arXiv:1902.01996, with the zeros of a lottery ticket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.blocks import decoder_blocks
from leanmill.core.errors import ConfigError
from leanmill.models.build import build_on_meta
from leanmill.models.materialise import draw
from leanmill.models.pretrained import load_weights, local_folder, pretrained_config
from leanmill.parallel.collectives import sum_over_ranks
from leanmill.parallel.launch import Ranks
from leanmill.recipe.compress import CalibratedRecipe
from leanmill.trainer.passes.folder import SourceFolder
from leanmill.trainer.passes.run import calibration_rows


Change = Literal["early", "drawn", "shuffled"]
"""`early`: the values of an earlier moment, the layer's zeros staying; `drawn`: values as the family draws them,
likewise; `shuffled`: its values and zeros at other places of the same matrix."""


@dataclass(frozen=True, kw_only=True)
class LayerOfTicket:
    """What becomes of the loss when one part of the model gets other values."""

    name: str
    zero_fraction: float
    rises: dict[Change, float]
    """Of the loss of the next token, nats, over that of the ticket."""


@dataclass(frozen=True, kw_only=True)
class TicketStudy:
    """The whole table."""

    loss: float
    """Of the ticket as it is, nats a token."""
    layers: list[LayerOfTicket]


@torch.no_grad()
def study_ticket(
    recipe: CalibratedRecipe, ranks: Ranks, *, earlier: Path | None, by: Literal["block", "layer"]
) -> TicketStudy:
    """Change the linear layers of decoder blocks, a block or a layer at a time, and see the loss. A collective.

    Args:
        recipe: Names the trained ticket, and text. The whole model is loaded, in fp32.
        ranks: Each runs its share of the rows.
        earlier: Folder of the same model at an earlier moment; None leaves `early` out.
        by: Whether the layers of a block change together.

    Raises:
        ConfigError: The two models hold other layers.
    """
    pretrained_config(recipe.model)
    folder = local_folder(str(recipe.model.path), recipe.model.revision)
    config = recipe.model.model_copy(update={"path": str(folder), "revision": None})
    rows = calibration_rows(recipe, folder, ranks)
    model: Any = load_weights(config, dtype=torch.float32).to(ranks.device).eval()
    drawn = build_on_meta(config, packed=False)
    draw(drawn, seed=recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    values: dict[Change, Callable[[str, Tensor], Tensor]] = {}
    if earlier is not None:
        source = SourceFolder(earlier)
        values["early"] = lambda name, weight: _under_zeros(_read(source, name, weight), weight)
    values |= {
        "drawn": lambda name, weight: _under_zeros(drawn.get_parameter(f"{name}.weight"), weight),
        "shuffled": lambda name, weight: weight.flatten()[
            torch.randperm(weight.numel(), generator=generator).to(weight.device)
        ].view_as(weight),
    }
    loss = _loss(model, rows)
    found = []
    for part, names in _parts(model, by):
        layers = {name: model.get_submodule(name).weight for name in names}
        rises: dict[Change, float] = {}
        for change, value in values.items():
            with _changed(layers, value):
                rises[change] = _loss(model, rows) - loss
        zeros = sum(int((weight == 0).sum()) for weight in layers.values())
        total = sum(weight.numel() for weight in layers.values())
        found.append(LayerOfTicket(name=part, zero_fraction=zeros / total, rises=rises))
    return TicketStudy(loss=loss, layers=found)


def _parts(model: nn.Module, by: Literal["block", "layer"]) -> list[tuple[str, list[str]]]:
    """What changes at a time, and the names of its linear layers."""
    names = {id(module): name for name, module in model.named_modules()}
    parts = []
    for block in decoder_blocks(model):
        inside = [names[id(module)] for module in block.modules() if isinstance(module, nn.Linear)]
        parts += [(names[id(block)], inside)] if by == "block" else [(name, [name]) for name in inside]
    return [(part, inside) for part, inside in parts if inside]


@contextmanager
def _changed(layers: Mapping[str, Tensor], value: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    trained = {name: weight.clone() for name, weight in layers.items()}
    for name, weight in layers.items():
        weight.copy_(value(name, weight))
    yield
    for name, weight in layers.items():
        weight.copy_(trained[name])


def _under_zeros(values: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight != 0, values.to(weight), 0.0)


def _read(source: SourceFolder, name: str, weight: Tensor) -> Tensor:
    key = f"{name}.weight"
    found = source.read([key])[key] if key in source.keys else None
    if found is None or found.shape != weight.shape:
        what = "has no" if found is None else f"has a {list(found.shape)} as"
        raise ConfigError(
            f"{source.path} {what} {key}, which is {list(weight.shape)} in the ticket; give a folder of the same model "
            f"at an earlier moment, e.g. what leanmill export wrote of an early checkpoint"
        )
    return found


def _loss(model: Any, rows: Sequence[dict[str, Tensor]]) -> float:
    """Mean over the tokens of all ranks."""
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in rows:
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        logits = model(**inputs, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        targets = inputs["input_ids"][:, 1:].flatten()
        total += torch.tensor([float(F.cross_entropy(logits, targets, reduction="sum")), targets.numel()]).to(total)
    summed, number = sum_over_ranks(total)
    return float(summed / number)
