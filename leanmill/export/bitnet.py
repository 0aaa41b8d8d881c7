"""Packing ternary and binary linear weights into the BitNet format that transformers loads.

What transformers computes for such a layer, with t the ternary weight in {-1, 0, 1}, s its scale and
x a row of the input: `q = clamp(round(x * 127 / max|x|), -128, 127)`, then
`y = (q @ t^T) / ((127 / max|x|) * (1 / s)) + bias`. The weight is exact; the input is quantised to
8 bits a row, which training did only with `activation_bits: 8`. The format has one
scale a weight.

Of transformers' modes, `bitlinear` and offline `autobitlinear` compute this, with equal results;
`bitlinear`, written here, keeps the weights packed in memory too. The online mode takes the mean
magnitude of the stored weight for its scale, which for an already ternary weight is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leanmill.core.errors import RunError
from leanmill.core.site import LinearSite
from leanmill.core.sites import iter_sites
from leanmill.core.stage import Slot
from leanmill.core.transposed import NOT_LINEAR, transposed_weights
from leanmill.export.compare import allowed, check_same, largest_difference, reload, sample_logits
from leanmill.export.folded import FoldedFormat, prepare_config
from leanmill.export.formats import Checked
from leanmill.models.pretrained import quiet_transformers


VALUES_PER_BYTE = 4
_ROUNDING = 1e-5
"""A ternary weight may differ from {-s, 0, s} by this share of s (straight-through rounding)."""
_ROUNDING_SLACK = 0.02
"""A rounded input may lie half a step and this share of one away: the order of fp32 sums before it."""


def _quantised(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, staged weight) of each linear site with a quantiser."""
    for name, site in iter_sites(model):
        if isinstance(site, LinearSite) and site.stage(Slot.QUANT) is not None:
            yield name, site.effective_weight().detach().float()


@torch.no_grad()
def _why_not(model: nn.Module) -> str | None:
    """Return why the format does not hold this model, and what to type."""
    if transposed_weights(model):
        return NOT_LINEAR
    weights = dict(_quantised(model))
    if not weights:
        return "no linear weight of this run is quantised, so there is nothing to pack; use --to hf"
    for name, weight in weights.items():
        if weight.shape[0] % VALUES_PER_BYTE:
            return (
                f"{name} has {weight.shape[0]} rows and the BitNet format packs {VALUES_PER_BYTE} at a time; "
                f"use --to packed or hf, or exclude it from its technique"
            )
        levels, scale = _split(weight)
        if (weight - levels * scale).abs().max() > _ROUNDING * scale:
            return (
                f"{name} is not {{-s, 0, s}} with one s for the whole weight, which is all the BitNet format holds; "
                f"train with ternary or binary {{granularity: tensor}}, or use --to packed or hf"
            )
    if len(_norms(model)) > 1:
        return (
            "some quantised layers have a norm inside (input_norm) and some have none, and the BitNet format says it "
            "once for all; train all with the same input_norm, or use --to hf"
        )
    return None


def _norms(model: nn.Module) -> set[float | None]:
    """Epsilons of the norms inside of quantised linear sites, None of those without."""
    sites = [site for _, site in iter_sites(model) if isinstance(site, LinearSite)]
    return {
        next((stage.norm_eps for stage in site.input_stages() if stage.norm_eps is not None), None)
        for site in sites
        if site.stage(Slot.QUANT) is not None
    }


def _split(weight: Tensor) -> tuple[Tensor, float]:
    """Return (ternary weight [out, in] float, scale)."""
    scale = weight.abs().max()
    return ((weight / scale).round(), scale.item()) if scale > 0 else (torch.zeros_like(weight), 1.0)


def pack(ternary: Tensor) -> Tensor:
    """Pack [out, in] of {-1, 0, 1} into [out / 4, in] uint8; row r of quarter i takes bits 2i, 2i + 1."""
    codes = (ternary + 1).to(torch.uint8).unflatten(0, (VALUES_PER_BYTE, -1))
    return codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6


class BitnetFormat(FoldedFormat):
    """transformers' BitNet folder: ternary linear weights at 2 bits, inputs of those layers rounded to 8 bits."""

    label: ClassVar[str] = "bitnet"
    packing: ClassVar[str] = "bitnet"

    @classmethod
    def covers(cls, model: Any) -> str | None:
        return _why_not(model)

    def before_folding(self, model: Any) -> None:
        (self.norm_eps,) = _norms(model)

    def after_settling(self, model: Any) -> None:
        self.ternary = {name: _split(weight) for name, weight in _quantised(model)}

    def write(self, folder: Path) -> None:
        prepare_config(self.model, self.rebuilt, folder)
        _save(self.model, self.ternary, folder, self.norm_eps)

    def check(self, folder: Path) -> Checked:
        """Load the folder back and compare it with the trained model on 8-bit inputs.

        The reference is the folded fp32 model with the input of each packed layer normed, where it was in
        training, and rounded to 8 bits, as the format does it. Two models that are equal up to fp32 sums may
        still round a value near the middle of two steps apart, and each such choice moves the logits by much
        more than those sums. The reference therefore takes the choices of the reloaded model, after checking
        that each is one that rounding its own input allows; what is left is the order of sums, and the bound
        that of any other export.

        Raises:
            RunError: A layer rounds or computes something else.
        """
        model, ternary, expected, eps = self.model, self.ternary, self.trained, self.norm_eps
        with torch.compiler.set_stance("force_eager"):  # transformers decorates this format with torch.compile
            reloaded = reload(folder)
            rounded: dict[str, list[Tensor]] = {name: [] for name in ternary}
            with _hooked(reloaded, {name: _record(rounded[name], eps) for name in ternary}):
                found = sample_logits(reloaded)
        with _hooked(model, {name: _replay(name, rounded[name], eps) for name in ternary}):
            reference = sample_logits(model)
        difference = check_same(found, reference, "the reloaded BitNet export, inputs rounded to 8 bits,")
        agreement = min((found[k].argmax(-1) == expected[k].argmax(-1)).float().mean().item() for k in expected)
        self.check_weights(reloaded, but=frozenset(f"{name}.weight" for name in ternary))
        return Checked(
            max_difference=difference,
            tolerance=allowed(reference),
            num_parameters=self.num_parameters,
            sparsity=self.sparsity,
            compared="largest logit difference to the trained model on 8-bit inputs",
            notes=(
                *self.notes,
                *self.left_out,
                f"{len(ternary)} linear weights packed to 2 bits, compared with inputs rounded to 8 bits, as "
                f"transformers does",
                f"the largest logit differs by {largest_difference(found, expected):.2e} from that of the model as it "
                f"was trained, {agreement:.1%} of sampled tokens keep their top logit",
            ),
        )


def _save(model: Any, ternary: dict[str, tuple[Tensor, float]], folder: Path, norm_eps: float | None) -> None:
    """Save the folded `model` with the linears in `ternary` packed, and a norm inside of each where there is one."""
    from transformers import BitNetQuantConfig

    plain = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in ternary]
    state = dict(model.state_dict())
    for name, (weight, scale) in ternary.items():
        state[f"{name}.weight"] = pack(weight)
        state[f"{name}.weight_scale"] = torch.tensor([1 / scale])
        if norm_eps is not None:
            state[f"{name}.rms_norm.weight"] = torch.ones(weight.shape[1])
    norm: dict[str, Any] = {} if norm_eps is None else {"use_rms_norm": True, "rms_norm_eps": norm_eps}
    quantization = BitNetQuantConfig(
        modules_to_not_convert=plain, linear_class="bitlinear", quantization_mode="offline", **norm
    )
    model.config.quantization_config = quantization
    try:
        with quiet_transformers():
            model.save_pretrained(folder, state_dict=state, safe_serialization=True)
    finally:
        del model.config.quantization_config


@contextmanager
def _hooked(model: Any, hooks: dict[str, Callable[..., Any]]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _record(rounded: list[Tensor], norm_eps: float | None) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rounded.append(quantise_input(_normed(inputs[0], norm_eps)))

    return hook


def _replay(name: str, rounded: list[Tensor], norm_eps: float | None) -> Callable[..., Tensor]:
    """Give a layer of the reference the rounded inputs of the reloaded one, call by call."""
    left = list(rounded)

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        taken, rows = left.pop(0), _normed(inputs[0], norm_eps)
        step = rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / 127
        if not ((rows - taken).abs() <= (0.5 + _ROUNDING_SLACK) * step).all():  # not >, so that NaN fails
            raise RunError(f"the input of {name} differs in the reloaded BitNet export; nothing was written")
        return taken

    return hook


def _normed(rows: Tensor, norm_eps: float | None) -> Tensor:
    """Divide each row [..., in] by its root mean square, where there is a norm."""
    return rows if norm_eps is None else rows * (rows.square().mean(-1, keepdim=True) + norm_eps).rsqrt()


def quantise_input(rows: Tensor) -> Tensor:
    """Round each row [..., in] to 8 bits by its largest magnitude and back, as transformers does."""
    scale = 127 / rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    return (rows * scale).round().clamp(-128, 127) / scale
