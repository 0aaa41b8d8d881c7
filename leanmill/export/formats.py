"""What a checkpoint can be exported as, and the one way every export goes. Importing this imports no torch.

A format is a class; the table says where. Packages add their own through the entry-point group
`leanmill.formats` (name = "module:Class").
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from leanmill.core.errors import ConfigError
from leanmill.core.near import near_names
from leanmill.core.technique import ModelTask


if TYPE_CHECKING:
    from leanmill.trainer.rebuild import Rebuilt

Activations = Literal["trained", "float"]
"""`trained` refuses what the format does not repeat, `float` leaves it out."""

FORMATS: dict[str, str] = {
    "hf": "leanmill.export.hf:HfFormat",
    "hf_code": "leanmill.export.own_code:HfCodeFormat",
    "bitnet": "leanmill.export.bitnet:BitnetFormat",
    "packed": "leanmill.export.packed:PackedFormat",
    "adapter": "leanmill.export.adapter:AdapterFormat",
}
PACKINGS: dict[str, str] = {
    "none": FORMATS["hf"],
    "bitnet": FORMATS["bitnet"],
    "int2": "leanmill.export.packed:Int2Format",
    "int4": "leanmill.export.packed:Int4Format",
    "int8": "leanmill.export.packed:Int8Format",
    "ternary": "leanmill.export.packed:TernaryFormat",
    "binary": "leanmill.export.packed:BinaryFormat",
    "mxfp4": "leanmill.export.packed:Mxfp4Format",
    "nvfp4": "leanmill.export.packed:Nvfp4Format",
    "compressed_tensors": "leanmill.export.compressed_tensors:CompressedTensorsFormat",
    "gguf": "leanmill.export.gguf:GgufFormat",
    "gguf_tq2_0": "leanmill.export.gguf:Gguf2BitFormat",
    "2_4": "leanmill.export.semi_structured:SemiStructuredFormat",
}
"""What `--to hf` may be packed as."""
GROUP = "leanmill.formats"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What was found when a folder was loaded back."""

    max_difference: float
    """Largest absolute difference to the trained model."""
    tolerance: float
    """What that was allowed to be."""
    num_parameters: int
    """Of the exported model or adapter."""
    sparsity: Mapping[str, float] = field(default_factory=dict)
    """Share of zeros in each weight that carries a mask."""
    notes: tuple[str, ...] = ()
    compared: str = "largest logit difference to the trained model"
    """What `max_difference` is."""


class Format(ABC):
    """One export under way: made from the trained model, which it may change, then written, then checked.

    Args:
        rebuilt: The trained model, its sites and adapters in place.
        out_dir: Where the folder will stand once it is checked.
        activations: What to do about rounded activations that the format does not repeat.

    Raises:
        ConfigError: This model has no such form.
    """

    label: ClassVar[str]
    """Name in the report and in `leanmill.json`."""
    model_tasks: ClassVar[frozenset[ModelTask]] = frozenset({"causal_lm"})
    """What models that it takes are for (`model.task`)."""

    @abstractmethod
    def __init__(self, rebuilt: Rebuilt, out_dir: Path, activations: Activations) -> None: ...

    @classmethod
    @abstractmethod
    def covers(cls, model: Any) -> str | None:
        """Return why this model cannot be written so, and what to type instead; None where it can."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write everything into a folder that is there and empty."""

    @abstractmethod
    def check(self, folder: Path) -> Checked:
        """Load what `write` wrote and compare it with the trained model.

        Raises:
            RunError: It is another model.
        """


def known_formats() -> dict[str, str]:
    """Return every format: Leanmill's own, then those of installed packages."""
    return {**_of_packages(), **FORMATS}


@functools.cache
def _of_packages() -> dict[str, str]:
    return {point.name: point.value for point in importlib.metadata.entry_points(group=GROUP)}


def format_class(name: str, packing: str = "none") -> type[Format]:
    """Import and return a format.

    Args:
        name: A known format.
        packing: How the weights of `hf` are packed; other formats say that by their name.

    Raises:
        ConfigError: There is none of that name, or none that packs so.
    """
    known = known_formats()
    if name not in known:
        raise ConfigError(f"unknown export format {name!r}; {_hint(name, known)}")
    if packing not in PACKINGS:
        raise ConfigError(f"unknown packing {packing!r}; {_hint(packing, PACKINGS)}")
    if packing != "none" and name != "hf":
        raise ConfigError(f"--packing {packing} is a form of --to hf, not of --to {name}; type --to hf or leave it out")
    path = known[name] if packing == "none" else PACKINGS[packing]
    module_name, _, class_name = path.partition(":")
    return getattr(importlib.import_module(module_name), class_name)  # type: ignore[no-any-return]


def _hint(name: str, known: Mapping[str, str]) -> str:
    near = near_names(name, known, count=2, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
