"""A model whose quantised linear weights stay packed: 1, 2, 4 or 8 bits, or five ternary codes a byte, in memory too.

The folder has the config and tokenizer of any Hugging Face folder, but its tensors are in
`packed.safetensors`, so that nobody takes it for a model that transformers loads: a packed layer has
`<name>.packed`, uint8 [out, bytes], and `<name>.scales`, fp32 [out, groups], in the place of
`<name>.weight`, and `packed.json` says for each how they are read. `load` gives back a model that computes
with `leanmill.kernels.packed_matmul`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.checkpoint.storage import write_tensors
from leanmill.core.errors import ConfigError, RunError
from leanmill.core.site import LinearSite
from leanmill.core.sites import Sites, iter_sites
from leanmill.core.stage import Codes, Slot
from leanmill.export.compare import TOLERANCE, sample_logits
from leanmill.export.folded import FoldedFormat, prepare_config
from leanmill.export.formats import Checked
from leanmill.kernels.fake_quant.activations import quantise_activations
from leanmill.kernels.packed_matmul.op import packed_matmul
from leanmill.kernels.packing.encoding import Encoding
from leanmill.kernels.packing.op import pack, unpack
from leanmill.models.pretrained import quiet_transformers


TENSORS, LAYERS = "packed.safetensors", "packed.json"


class PackedLinear(nn.Module):
    """A linear layer for evaluation that holds its weight as packed codes.

    Args:
        packed: uint8 [out, bytes], what `packing.pack` returns.
        scales: fp32 [out, groups].
        bias: [out] or None.
        in_features: Inputs of a row, which bytes do not tell.
        encoding: How codes are packed.
        zero: The code that stands for zero.
        int8_activations: Round each token to 8 bits first, as BitNet b1.58 does; ternary only.
    """

    packed: Tensor
    scales: Tensor

    def __init__(
        self, packed: Tensor, scales: Tensor, bias: Tensor | None, *,
        in_features: int, encoding: Encoding, zero: float, int8_activations: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.in_features, self.out_features = in_features, packed.shape[0]
        self.encoding, self.zero, self.int8_activations = encoding, zero, int8_activations

    @classmethod
    def of(cls, codes: Codes, bias: Tensor | None, *, int8_activations: bool) -> PackedLinear:
        """Pack the codes of a weight [out, in]."""
        out_features, in_features = codes.values.shape
        scales = codes.scales.float().reshape(-1, codes.scales.shape[-1]).expand(out_features, -1).contiguous()
        return cls(
            pack(codes.values, codes.encoding), scales, None if bias is None else bias.detach(),
            in_features=in_features, encoding=codes.encoding, zero=codes.zero, int8_activations=int8_activations,
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        """Multiply tokens [..., in] of any float dtype."""
        zero = None if self.encoding == "ternary" else self.zero
        out = packed_matmul(
            tokens, self.packed, self.scales, self.encoding, zero_points=zero, int8_activations=self.int8_activations
        )
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def weight_values(self) -> Tensor:
        """Return the weight [out, in] that the codes stand for, fp32."""
        values = unpack(self.packed, self.encoding, self.in_features).float() - self.zero
        groups = values.unflatten(-1, (self.scales.shape[-1], -1)) * self.scales.unsqueeze(-1)
        return groups.flatten(-2)

    def settings(self) -> dict[str, Any]:
        """Return what the tensors do not say, JSON-able."""
        return {
            "in_features": self.in_features,
            "encoding": self.encoding,
            "zero": self.zero,
            "int8_activations": self.int8_activations,
        }

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, encoding={self.encoding}"


class PackedFormat(FoldedFormat):
    """Linear weights made of integers stay packed; see `load`."""

    label: ClassVar[str] = "packed"
    packing: ClassVar[str] = "packed"

    @classmethod
    def covers(cls, model: Any) -> str | None:
        if next(_packable(model), None) is None:
            return (
                "no linear weight of this run is made of integers (ternary, int_quant and lsq without a rotation make "
                "some), so there is nothing to pack; use --to hf"
            )
        return None

    @torch.no_grad()
    def before_folding(self, model: Any) -> None:
        repeats = self.activations == "trained"
        self.layers = {
            name: PackedLinear.of(codes, site.bias, int8_activations=repeats and _rounds_to_int8(site))
            for name, site, codes in _packable(model)
        }

    def write(self, folder: Path) -> None:
        prepare_config(self.model, self.rebuilt, folder)
        _save(self.model, self.layers, folder)

    def check(self, folder: Path) -> Checked:
        reloaded = load(folder)
        difference, tolerance = _check_layers(reloaded, self.staged)
        _check_rest(reloaded, self.model)
        size = sum(layer.packed.nbytes + layer.scales.nbytes for layer in self.layers.values())
        plain = sum(2 * self.staged[f"{name}.weight"].numel() for name in self.layers)
        return Checked(
            max_difference=difference,
            tolerance=tolerance,
            num_parameters=self.num_parameters,
            sparsity=self.sparsity,
            compared="largest difference of a packed layer's output to the trained layer's",
            notes=(
                *self.notes,
                *self.left_out,
                f"{len(self.layers)} linear weights packed, {size / plain:.1%} of their bytes in bf16",
            ),
        )


def _packable(model: nn.Module) -> Iterator[tuple[str, LinearSite, Codes]]:
    """Yield (name, site, codes) of each linear site whose last stage makes integers."""
    sites = Sites(model)
    for name, site in iter_sites(model):
        # A head that shares its weight with the table of inputs stays plain, as the table does.
        if isinstance(site, LinearSite) and not sites.tied_to(site):
            codes = _codes_of(site)
            if codes is not None:
                yield name, site, codes


def _rounds_to_int8(site: LinearSite) -> bool:
    return any(PackedFormat.packing in stage.formats for stage in site.input_stages())


@torch.no_grad()
def _codes_of(site: LinearSite) -> Codes | None:
    stages = site.weight_stages()
    if not stages or site.stage(Slot.ROTATE) is not None:
        return None
    weight = site.raw_weight.detach()
    for stage in stages[:-1]:
        weight = stage(weight)
    return stages[-1].codes(weight)


def _save(model: Any, layers: dict[str, PackedLinear], folder: Path) -> None:
    """Save the folded `model` with the linears in `layers` packed."""
    with quiet_transformers():
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    state = {name: tensor for name, tensor in _own(model) if name.removesuffix(".weight") not in layers}
    for name, layer in layers.items():
        state |= {f"{name}.packed": layer.packed, f"{name}.scales": layer.scales}
    write_tensors(folder / TENSORS, {name: tensor.contiguous() for name, tensor in state.items()})
    settings = {name: layer.settings() for name, layer in layers.items()}
    (folder / LAYERS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _own(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, tied ones once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def load(folder: str | Path) -> Any:
    """Load a packed folder: a causal LM in eval mode on the CPU, fp32 but for what is packed.

    Raises:
        ConfigError: The folder holds no packed model.
        RunError: Its tensors are not those of its config.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    import leanmill.models.pr_moe.register  # noqa: F401

    folder = Path(folder)
    if not (folder / LAYERS).is_file():
        raise ConfigError(f"{folder} holds no {LAYERS}; give a folder that `leanmill export --to packed` wrote")
    settings = json.loads((folder / LAYERS).read_text(encoding="utf-8"))
    state = load_file(folder / TENSORS)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    for name, options in settings.items():
        parent, _, leaf = name.rpartition(".")
        bias = state.get(f"{name}.bias")
        layer = PackedLinear(state[f"{name}.packed"], state[f"{name}.scales"], bias, **options)
        setattr(model.get_submodule(parent), leaf, layer)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise RunError(f"{folder}: {[*unexpected, *missing][0]} is in one of {TENSORS} and config.json only")
    return model.eval()


@torch.no_grad()
def _check_layers(reloaded: Any, staged: dict[str, Tensor]) -> tuple[float, float]:
    """Compare each packed layer of a reloaded folder with the trained one, on the inputs that it gets.

    Layer by layer, since where inputs are rounded two models that are equal up to the order of sums
    may round a value apart, which moves logits by more than sums do.

    Args:
        reloaded: What `load` returned.
        staged: Weights that training multiplied with, by parameter name.

    Returns:
        The largest difference of a layer's output, and what that may be.

    Raises:
        RunError: A weight is another one, or a layer computes something else.
    """
    worst, limit = 0.0, 0.0

    def compare(name: str, layer: PackedLinear, tokens: Tensor, found: Tensor) -> None:
        nonlocal worst, limit
        rounded = quantise_activations(tokens) if layer.int8_activations else tokens
        expected = F.linear(rounded, staged[f"{name}.weight"].float(), layer.bias)
        difference = (found - expected).abs().max().item()
        allowed = TOLERANCE * max(1.0, expected.abs().max().item())
        if not difference <= allowed:
            raise RunError(
                f"{name} of the packed export computes other values than the trained layer (largest difference "
                f"{difference:.2e}, allowed {allowed:.0e}); nothing was written. Report this with the recipe"
            )
        worst, limit = max(worst, difference), max(limit, allowed)

    handles = []
    for name, layer in reloaded.named_modules():
        if isinstance(layer, PackedLinear):
            weight = staged[f"{name}.weight"].float()
            if (layer.weight_values() - weight).abs().max() > 1e-5 * weight.abs().max():
                raise RunError(f"{name} of the packed export is not the trained weight; nothing was written")
            handles.append(
                layer.register_forward_hook(lambda m, args, out, name=name: compare(name, m, args[0], out))  # type: ignore[misc]
            )
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
