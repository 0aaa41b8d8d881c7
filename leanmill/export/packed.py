"""A model whose quantised weights stay packed: integers of 1, 2, 4 or 8 bits, ternary ones, floats of 4, 6 or 8 bits.

A packed layer has `<name>.packed`, uint8 [out, bytes], and `<name>.scales`, [out, groups], in the place of
`<name>.weight`; `packed_folder` says where. The loaded model computes with `leanmill.kernels.packed_matmul`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import RunError
from leanmill.core.facets import Codes, FloatCodes
from leanmill.core.site import EmbeddingSite, LinearSite, Site
from leanmill.core.sites import Sites, iter_sites
from leanmill.core.stage import Slot
from leanmill.export.compare import TOLERANCE, sample_logits
from leanmill.export.float_layers import FloatEmbedding, FloatLinear, form_of
from leanmill.export.folded import FoldedFormat, prepare_config
from leanmill.export.formats import Checked
from leanmill.export.packed_folder import load, save
from leanmill.export.packed_layers import PackedEmbedding, PackedLinear
from leanmill.export.recode import NAMES, recoded, why_not
from leanmill.export.stored_layer import StoredLayer
from leanmill.kernels.fake_quant.activations import quantise_activations
from leanmill.kernels.packing.encoding import Encoding


class PackedFormat(FoldedFormat):
    """Weights made of integers or small floats stay packed, each as small as it gets; see `packed_folder`."""

    label: ClassVar[str] = "packed"
    packing: ClassVar[str] = "packed"

    @classmethod
    @torch.no_grad()
    def covers(cls, model: Any) -> str | None:
        is_any = False
        for name, _, codes in packable(model):
            is_any = True
            reason = cls.why_not(name, codes)
            if reason is not None:
                return reason
        return None if is_any else NOTHING_TO_PACK

    @classmethod
    def why_not(cls, name: str, codes: Codes | FloatCodes) -> str | None:
        """Return why the weight `name` cannot be held so, and what to type; None where it can."""
        return None

    @classmethod
    def held(cls, codes: Codes | FloatCodes) -> Codes | FloatCodes:
        """Return `codes` as they are stored."""
        return codes

    @torch.no_grad()
    def before_folding(self, model: Any) -> None:
        repeats = self.activations == "trained"
        self.layers: dict[str, StoredLayer] = {}
        for name, site, own in packable(model):
            self.layers[name] = _layer_of(site, self.held(own), int8=repeats and _rounds_to_int8(site))
        self.shared = _shared(model, self.layers)

    def write(self, folder: Path) -> None:
        prepare_config(self.model, self.rebuilt, folder)
        save(self.model, self.layers, self.shared, folder)

    def check(self, folder: Path) -> Checked:
        reloaded = load(folder)
        difference, tolerance = _check_layers(reloaded, self.layers, self.staged)
        _check_rest(reloaded, self.model)
        stored = [(name, layer) for name, layer in self.layers.items() if name not in self.shared]
        size = sum(layer.stored_bytes for _, layer in stored)
        plain = sum(2 * self.staged[f"{name}.weight"].numel() for name, _ in stored)
        return Checked(
            max_difference=difference,
            tolerance=tolerance,
            num_parameters=self.num_parameters,
            sparsity=self.sparsity,
            compared="largest difference of a packed layer's output to the trained layer's",
            notes=(
                *self.notes,
                *self.left_out,
                f"{len(self.layers)} weights packed, {size / plain:.1%} of their bytes in bf16",
            ),
        )


class _IntegerFormat(PackedFormat):
    encoding: ClassVar[Encoding]
    """Of every weight."""

    @classmethod
    def why_not(cls, name: str, codes: Codes | FloatCodes) -> str | None:
        if isinstance(codes, FloatCodes):
            return (
                f"{name} is made of floats ({form_of(codes)}), and {NAMES[cls.encoding]} takes integers; type --to "
                f"packed"
            )
        return why_not(name, codes, cls.encoding)

    @classmethod
    def held(cls, codes: Codes | FloatCodes) -> Codes | FloatCodes:
        assert isinstance(codes, Codes)
        found = recoded(codes, cls.encoding)
        assert found is not None
        return found


class Int8Format(_IntegerFormat):
    """`packed` with 8 bits a code for every weight."""

    label: ClassVar[str] = "packed int8"
    encoding: ClassVar[Encoding] = 8


class Int4Format(_IntegerFormat):
    """`packed` with 4 bits a code for every weight."""

    label: ClassVar[str] = "packed int4"
    encoding: ClassVar[Encoding] = 4


class Int2Format(_IntegerFormat):
    """`packed` with 2 bits a code for every weight."""

    label: ClassVar[str] = "packed int2"
    encoding: ClassVar[Encoding] = 2


class TernaryFormat(_IntegerFormat):
    """`packed` with five codes a byte for every weight."""

    label: ClassVar[str] = "packed ternary"
    encoding: ClassVar[Encoding] = "ternary"


class BinaryFormat(_IntegerFormat):
    """`packed` with 1 bit a code for every weight."""

    label: ClassVar[str] = "packed binary"
    encoding: ClassVar[Encoding] = 1


class _FloatFormat(PackedFormat):
    form: ClassVar[str]
    """Of every weight."""

    @classmethod
    def why_not(cls, name: str, codes: Codes | FloatCodes) -> str | None:
        found = form_of(codes) if isinstance(codes, FloatCodes) else "integers"
        if found == cls.form:
            return None
        return f"{name} is made of {found}, not of {cls.form}; type --to packed, which takes each weight as it is"


class Mxfp4Format(_FloatFormat):
    """`packed` where every weight is of OCP's MXFP4: 4.25 bits a weight."""

    label: ClassVar[str] = "packed mxfp4"
    form: ClassVar[str] = "mxfp4"


class Nvfp4Format(_FloatFormat):
    """`packed` where every weight is of NVFP4: 4.5 bits a weight."""

    label: ClassVar[str] = "packed nvfp4"
    form: ClassVar[str] = "nvfp4"


NOTHING_TO_PACK = (
    "no weight of this run is made of integers or small floats (ternary, binary, int_quant, lsq, paretoq and fp_quant "
    "of 4, 6 or 8 bits, without a rotation, make some), so there is nothing to pack; use --to hf"
)


def packable(model: nn.Module) -> Iterator[tuple[str, LinearSite | EmbeddingSite, Codes | FloatCodes]]:
    """Yield (name, site, codes) of each linear weight or table whose last stage makes integers or small floats."""
    sites, by_name = Sites(model), dict(iter_sites(model))
    for name, site in by_name.items():
        # A head that is the table of inputs is packed only where the table becomes the same.
        others = [by_name.get(other) for other in sites.tied_to(site)]
        if isinstance(site, (LinearSite, EmbeddingSite)) and all(_is_staged_alike(site, other) for other in others):
            codes = _codes_of(site)
            if codes is not None:
                yield name, site, codes


def packable_linears(model: nn.Module) -> Iterator[tuple[str, LinearSite, Codes | FloatCodes]]:
    """Yield those of `packable` that are linear layers and share their weight with nothing."""
    sites = Sites(model)
    for name, site, codes in packable(model):
        if isinstance(site, LinearSite) and not sites.tied_to(site):
            yield name, site, codes


def _layer_of(site: LinearSite | EmbeddingSite, codes: Codes | FloatCodes, *, int8: bool) -> StoredLayer:
    if isinstance(codes, FloatCodes):
        return FloatEmbedding.of(codes) if isinstance(site, EmbeddingSite) else FloatLinear.of(codes, site.bias)
    if isinstance(site, EmbeddingSite):
        return PackedEmbedding.of(codes)
    return PackedLinear.of(codes, site.bias, int8_activations=int8)


def _shared(model: nn.Module, layers: Mapping[str, StoredLayer]) -> dict[str, str]:
    """Return by name, for weights that are tied to an earlier one of `layers`, that one's name."""
    sites, by_name = Sites(model), dict(iter_sites(model))
    stored: set[str] = set()
    found: dict[str, str] = {}
    for name in layers:
        earlier = next((other for other in sites.tied_to(by_name[name]) if other in stored), None)
        if earlier is None:
            stored.add(name)
        else:
            found[name] = earlier
    return found


def _is_staged_alike(site: Site, other: Site | None) -> bool:
    return other is not None and list(map(id, site.weight_stages())) == list(map(id, other.weight_stages()))


def _rounds_to_int8(site: LinearSite | EmbeddingSite) -> bool:
    return any(PackedFormat.packing in stage.formats for stage in site.input_stages())


@torch.no_grad()
def _codes_of(site: LinearSite | EmbeddingSite) -> Codes | FloatCodes | None:
    stages = site.weight_stages()
    if not stages or site.stage(Slot.ROTATE) is not None:
        return None
    weight = site.raw_weight.detach()
    for stage in stages[:-1]:
        weight = stage(weight)
    return stages[-1].codes(weight) or stages[-1].float_codes(weight)


@torch.no_grad()
def _check_layers(reloaded: Any, layers: dict[str, StoredLayer], staged: dict[str, Tensor]) -> tuple[float, float]:
    """Compare each packed layer of a reloaded folder with the trained one, on the inputs that it gets.

    Layer by layer, since where inputs are rounded two models that are equal up to the order of sums
    may round a value apart, which moves logits by more than sums do.

    Args:
        reloaded: What `load` returned.
        layers: What was written, whose codes are to come back bit for bit.
        staged: Weights that training multiplied with, by parameter name.

    Returns:
        The largest difference of a layer's output, and what that may be.

    Raises:
        RunError: A weight is another one, or a layer computes something else.
    """
    worst, limit = 0.0, 0.0

    def compare(name: str, layer: StoredLayer, given: Tensor, found: Tensor) -> None:
        nonlocal worst, limit
        weight = staged[f"{name}.weight"].float()
        if isinstance(layer, (PackedEmbedding, FloatEmbedding)):
            expected = F.embedding(given, weight)
        else:
            rounds = isinstance(layer, PackedLinear) and layer.int8_activations
            expected = F.linear(quantise_activations(given) if rounds else given, weight, layer.bias)
        difference = (found - expected).abs().max().item()
        allowed = TOLERANCE * max(1.0, expected.abs().max().item())
        if not difference <= allowed:
            raise RunError(
                f"{name} of the packed export computes other values than the trained layer (largest difference "
                f"{difference:.2e}, allowed {allowed:.0e}); nothing was written. Report this with the recipe"
            )
        worst, limit = max(worst, difference), max(limit, allowed)

    handles = []
    for name, written in layers.items():
        layer, weight = reloaded.get_submodule(name), staged[f"{name}.weight"].float()
        is_same = all(torch.equal(getattr(layer, key), getattr(written, key)) for key in written.stored)
        if not is_same or (layer.weight_values() - weight).abs().max() > 1e-5 * weight.abs().max():
            raise RunError(f"{name} of the packed export is not the trained weight; nothing was written")
        handles.append(layer.register_forward_hook(lambda m, args, out, name=name: compare(name, m, args[0], out)))
    try:
        sample_logits(reloaded)
    finally:
        for handle in handles:
            handle.remove()
    return worst, limit


def _check_rest(reloaded: Any, model: Any) -> None:
    """Look at everything that is not packed."""
    found = dict(reloaded.named_parameters())
    for name, parameter in model.named_parameters():
        if name in found and not torch.equal(found[name], parameter):
            raise RunError(f"{name} of the packed export is not the trained one; nothing was written")
